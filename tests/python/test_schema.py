"""The op's schema: graphs that were made with version 0.2 still call it."""

import torch

import pbsattn  # noqa: F401

# Kept as it was in 0.2; later versions only add keywords with defaults at its end.
SCHEMA_0_2 = (
    "pbsattn::attention(Tensor q, Tensor k, Tensor v, *, str method='pbs', str settings='', str heads='', "
    "str layout='bhsd', bool return_lse=False) -> (Tensor out, Tensor lse)"
)


def test_graphs_of_0_2_call_the_op():
    kept, now = torch._C.parse_schema(SCHEMA_0_2), torch.ops.pbsattn.attention.default._schema
    assert now.is_backward_compatible_with(kept), f"{now}\nis not what {kept} has grown to"
    shortened = torch._C.parse_schema(SCHEMA_0_2.replace(", str layout='bhsd'", ""))
    assert not shortened.is_backward_compatible_with(kept), "this comparison can't fail"
