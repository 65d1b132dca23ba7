// The definition of every stage, for reading and for testing backends against.
//
//     Head head = load_head(inputs, geometry, batch, q_head);
//     order   = order_keys(geometry, key_scores(head, geometry, logits));       // permute, or learned_scores()
//     scores  = row_scores(head, options, geometry, row, order, prepare_scores(head, options, geometry, order));
//     list    = select_blocks(options, geometry, row, scores, order);           // select
//     result  = attend_query(head, geometry, logits, query, order, list);       // attend
//
// Everything is computed in double: backends work in float32 and may differ from here by float32 rounding, and by which
// of two keys or blocks comes first when their scores agree that closely. What a score means for the keep rule, for
// every backend alike, stands in core/score_traits.h.
#pragma once

#include "reference/attend/attend.h"
#include "reference/permute/permute.h"
#include "reference/select/select.h"

namespace pbsattn::reference {

// Decides orders and lists of all heads. options.scale is resolved (not 0), as Plan::options() gives it. Orders of
// Permutation::arrival are read from `order`, and written.
Trace decide(const Inputs& inputs, const Options& options, const Geometry& geometry, const KeyOrder& order = {});

// Attends over any order and lists, a backend's own for instance.
void attend(const Inputs& inputs, const Options& options, const Geometry& geometry, const Trace& trace,
            const Outputs& outputs);

}  // namespace pbsattn::reference
