"""The pbsattn library: options, plans and tables. Tensors are addresses and strides."""

import numpy

has_cuda: bool

# (address, dtype, batch stride, head stride, token stride)
_View = tuple[int, int, int, int, int]
# (address, count) of float32
_Array = tuple[int, int]
# the same of the order's weights, and pbsattn::RopePairs
_Weights = tuple[int, int, int]
# (address of int32, batch stride, tokens of a page, pages of the cache); 0 where keys and values lie contiguous
_Pages = tuple[int, int, int, int]

def version() -> str: ...
def methods() -> list[tuple[str, str]]: ...
def options(method: str, **overrides: float | int | str | None) -> Options: ...
def describe_cpu() -> DeviceInfo: ...

learned_method: str  # that a file's settings change, where the caller names none
largest_learned: int  # bytes

def parse_learned(contents: bytes, name: str) -> LearnedFile: ...

class LearnedFile:
    """A learned order's file: see pbsattn::learned::File."""

    name: str
    model: str
    fitted_on: str
    settings: str
    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    pairs: str
    @property
    def weights(self) -> numpy.ndarray: ...
    def in_pairs(self, pairs: str) -> LearnedFile: ...
    def require_model(self, layers: int, query_heads: int, kv_heads: int, head_dim: int) -> None: ...

class DeviceInfo:
    name: str
    processor: str
    threads: int
    paths: list[str]
    f32_path: str
    bf16_path: str

class Options:
    def as_dict(self) -> dict[str, float | int | str]: ...

class Stats:
    """What one run did: (query block, key block) pairs over heads and batch, and seconds by stage."""

    visited_blocks: int
    causal_blocks: int
    permute_seconds: float
    select_seconds: float
    attend_seconds: float
    @property
    def density(self) -> float: ...
    @property
    def seconds(self) -> float: ...

class Trace:
    """What one run decided: see pbsattn::Trace."""

    first_row: int
    rows: int
    blocks: int
    @property
    def order(self) -> numpy.ndarray: ...
    @property
    def row_start(self) -> numpy.ndarray: ...
    @property
    def block(self) -> numpy.ndarray: ...

class SegmentCache:
    """In memory of the caller's: see pbsattn::SegmentCache."""

    def __init__(self, memory: int, size: int) -> None: ...
    @property
    def tokens(self) -> int: ...
    def clear(self) -> None: ...

class Plan:
    def __init__(
        self,
        options: Options | list[Options],
        device: str,
        index: int,
        threads: int,
        shape: tuple[int, int, int, int, int, int, int],  # head_dim_v last, 0 as head_dim
        workspace_cap: int | None = None,
    ) -> None: ...
    @property
    def workspace_size(self) -> int: ...
    @property
    def path(self) -> str: ...
    @property
    def options(self) -> Options: ...
    def run(
        self,
        q: _View,
        k: _View,
        v: _View,
        out: _View,
        lse: int,
        workspace: int,
        workspace_size: int,
        stream: int,
        sinks: _Array,
        order_weights: _Weights,
        pages: _Pages,
        stats: bool,
        cache: SegmentCache | None = None,
        cache_valid: int = 0,
    ) -> Stats | None: ...
    def cache_size(self, tokens: int) -> int: ...
    def trace(
        self,
        q: _View,
        k: _View,
        v: _View,
        out: _View,
        lse: int,
        workspace: int,
        workspace_size: int,
        stream: int,
        sinks: _Array,
        order_weights: _Weights,
        pages: _Pages,
    ) -> tuple[Stats, Trace]: ...
