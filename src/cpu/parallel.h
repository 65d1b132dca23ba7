// The threads of one process, and the one loop the stages need.
#pragma once

#include <cstdint>
#include <functional>

namespace pbsattn::cpu {

// Calls body(item, thread) for every item in [0, items), on `threads` threads with 0 <= thread < threads.
// Items are handed out in order, one at a time, so put the longest first. The caller works as thread 0 and
// returns when all are done. Loops from several callers run one after the other. Where the system refuses
// a thread, fewer do the work. Body must not throw and must not call parallel_for.
void parallel_for(int threads, std::int64_t items, const std::function<void(std::int64_t, int)>& body);

}  // namespace pbsattn::cpu
