"""The library under test: the C API of pbsattn.h, and its attend stage alone (attend_shim.cc), on torch tensors."""

import ctypes
import functools
import math

import torch

BLOCK = 128
SEGMENT = 256
NO_CAP = 2**64 - 1
# (head_dim, head_dim_v) that are checked and timed.
WIDTHS = ((128, 128), (64, 64), (96, 96), (256, 256), (192, 128))
CUDA = 2
LEARNED, ARRIVAL = 2, 3  # permutations
KV_HEAD = 1  # order scope
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

i32, i64, f32, f64, size_t, void_p = (
    ctypes.c_int32,
    ctypes.c_int64,
    ctypes.c_float,
    ctypes.c_double,
    ctypes.c_size_t,
    ctypes.c_void_p,
)


class Struct(ctypes.Structure):
    """One of pbsattn.h, which tells its size."""

    def __init__(self, *values, **fields):
        super().__init__(ctypes.sizeof(type(self)), *values, **fields)


class Options(Struct):
    _fields_ = [
        ("struct_size", size_t),
        ("permutation", i32),
        ("order_scope", i32),
        ("score", i32),
        ("keep", i32),
        ("correction", i32),
        ("rules", i32),
        ("precision", i32),
        ("fallback", i32),
        ("top_p", f32),
        ("threshold", f32),
        ("floor_top_p", f32),
        ("top_k", i32),
        ("density", f32),
        ("vertical", i32),
        ("slash", i32),
        ("tau", f32),
        ("min_budget", i32),
        ("block", i32),
        ("segment", i32),
        ("dense_last_rows", i32),
        ("sink_blocks", i32),
        ("local_blocks", i32),
        ("scale", f32),
        ("expected_density", f32),
        ("softcap", f32),
        ("window", i32),
        ("threshold_tokens", f32),
        ("two_step_queries", i32),
        ("two_step_exact", i32),
        ("two_step_reach", i32),
    ]


class Shape(Struct):
    _fields_ = [
        ("struct_size", size_t),
        ("batch", i64),
        ("q_heads", i64),
        ("kv_heads", i64),
        ("q_len", i64),
        ("kv_len", i64),
        ("head_dim", i64),
        ("head_dim_v", i64),
    ]


class Device(Struct):
    _fields_ = [("struct_size", size_t), ("kind", i32), ("threads", i32), ("index", i32), ("reserved", i32)]


class View(Struct):
    _fields_ = [
        ("struct_size", size_t),
        ("data", void_p),
        ("batch_stride", i64),
        ("head_stride", i64),
        ("token_stride", i64),
        ("dtype", i32),
        ("reserved", i32),
    ]


class Stats(Struct):
    _fields_ = [
        ("struct_size", size_t),
        ("visited_blocks", i64),
        ("causal_blocks", i64),
        ("permute_seconds", f64),
        ("select_seconds", f64),
        ("attend_seconds", f64),
    ]

    @property
    def density(self):
        return self.visited_blocks / self.causal_blocks


class OrderWeights(Struct):
    _fields_ = [("struct_size", size_t), ("values", void_p), ("count", size_t), ("pairs", i32), ("reserved", i32)]


class Pages(Struct):
    _fields_ = [("struct_size", size_t), ("table", void_p), ("batch_stride", i64), ("size", i64), ("count", i64)]


class Run(Struct):
    _fields_ = [
        ("struct_size", size_t),
        *((name, ctypes.POINTER(View)) for name in ("q", "k", "v", "out")),
        ("lse", void_p),
        ("workspace", void_p),
        ("workspace_size", size_t),
        ("stream", void_p),
        ("stats", ctypes.POINTER(Stats)),
        ("sinks", void_p),
        ("order_weights", ctypes.POINTER(OrderWeights)),
        ("order", void_p),
        ("pages", ctypes.POINTER(Pages)),
        ("cache", void_p),
        ("cache_valid", i64),
    ]


def weights_of(q, k):
    """Order weights [KV head][head_dim / 2 + head_dim] that score a key by its product with the mean query."""
    numbers = q[0].float().unflatten(0, (k.shape[1], -1)).mean((1, 2))
    return torch.cat([torch.zeros_like(numbers[:, ::2]), numbers], 1).contiguous()


def pointer(tensor):
    return None if tensor is None else tensor.data_ptr()


def view(tensor):
    """[batch, head, token, width] with any strides but the last."""
    return View(tensor.data_ptr(), *tensor.stride()[:3], DTYPES[tensor.dtype])


class Library:
    def __init__(self, path):
        self.c = ctypes.CDLL(str(path))
        self.c.pbsattn_last_error.restype = ctypes.c_char_p
        self.c.pbsattn_plan_workspace_size.restype = size_t
        self.c.pbsattn_plan_path.restype = ctypes.c_char_p
        self.c.attend_bench_scratch.restype = size_t
        self.c.pbsattn_plan_destroy.restype = None
        self.c.pbsattn_segment_cache_destroy.restype = None

    def check(self, status):
        if status != 0:
            raise RuntimeError(self.c.pbsattn_last_error().decode())

    def options(self, method, **changes):
        options = Options()
        self.check(self.c.pbsattn_method(method.encode(), ctypes.byref(options)))
        for name, value in changes.items():
            setattr(options, name, value)
        return options

    def plan(self, method, q, k, cap=NO_CAP, head_dim_v=0, **changes):
        """head_dim_v: the values' width, 0 for that of q and k."""
        return Plan(self, self.options(method, **changes), q, k, cap, head_dim_v)

    @functools.cached_property
    def widths(self):
        """Those of WIDTHS that this library takes; it is said which it doesn't, and why."""
        taken = []
        for widths in WIDTHS:
            refusal = self.refusal(*widths)
            if refusal:
                print(f"without head_dim {widths[0]}, head_dim_v {widths[1]}: {refusal}", flush=True)
            else:
                taken.append(widths)
        return taken

    def refusal(self, head_dim, head_dim_v):
        """Returns why no dense plan takes these widths of keys and values; None if one does."""
        q = torch.empty(1, 1, BLOCK, head_dim, dtype=torch.bfloat16, device="cuda")
        try:
            self.plan("full", q, q, head_dim_v=head_dim_v)
        except RuntimeError as error:
            return str(error)
        return None

    def attend(
        self, q, k, v, out, lse=None, segment=SEGMENT, permuted=None, lists=None, sinks=None, softcap=0.0, window=None
    ):
        """The attend stage: all causal blocks, a window's, or (row_start, row_count, blocks) over permuted K and V."""
        batch, q_heads, q_len, head_dim = q.shape
        kv_heads, kv_len = k.shape[1:3]
        scratch = torch.empty(
            self.c.attend_bench_scratch(i64(batch), i64(q_heads), i64(q_len), i64(kv_len)), dtype=torch.uint8, device="cuda"
        )
        permuted_k, permuted_v = permuted or (None, None)
        permuted_heads = 0 if permuted_k is None else permuted_k.shape[1]
        sizes = (i64 * 11)(
            batch,
            q_heads,
            kv_heads,
            q_len,
            kv_len,
            head_dim,
            v.shape[3],
            segment,
            permuted_heads,
            q.dtype == torch.bfloat16,
            kv_len if window is None else window,
        )
        strides = (i64 * 12)(*(s for t in (q, k, v, out) for s in t.stride()[:3]))
        tensors = (q, k, v, out)
        error = self.c.attend_bench(
            sizes,
            f32(1 / math.sqrt(head_dim)),
            f32(softcap),
            void_p(pointer(sinks)),
            *(void_p(pointer(t)) for t in tensors),
            strides,
            *(void_p(pointer(t)) for t in (lse, permuted_k, permuted_v, *(lists or (None, None, None)), scratch)),
            void_p(torch.cuda.current_stream().cuda_stream),
        )
        if error:
            raise RuntimeError(f"attend: CUDA error {error}")


class Plan:
    """Of options of all heads, or of an array of each head's."""

    def __init__(self, library, options, q, k, cap=NO_CAP, head_dim_v=0):
        self.library = library
        batch, q_heads, q_len, head_dim = q.shape
        # 0 where they are alike, since libraries that know of no other width take that.
        shape = Shape(batch, q_heads, k.shape[1], q_len, k.shape[2], head_dim, 0 if head_dim_v == head_dim else head_dim_v)
        self.handle = void_p()
        by_head = isinstance(options, ctypes.Array)
        create = library.c.pbsattn_plan_create_by_head if by_head else library.c.pbsattn_plan_create
        library.check(
            create(
                ctypes.byref(options),
                ctypes.byref(shape),
                ctypes.byref(Device(CUDA, 1, 0)),
                size_t(cap),
                ctypes.byref(self.handle),
            )
        )
        self.workspace_size = library.c.pbsattn_plan_workspace_size(self.handle)
        self.path = library.c.pbsattn_plan_path(self.handle).decode()
        self.workspace = torch.empty(self.workspace_size, dtype=torch.uint8, device="cuda")
        learned = not by_head and options.permutation == LEARNED
        self.weights = weights_of(q, k) if learned else None

    def __del__(self):
        if getattr(self, "handle", None):
            self.library.c.pbsattn_plan_destroy(self.handle)

    def cache(self, tokens):
        """Returns a SegmentCache for this plan and those of other lengths up to `tokens`; None where none is used."""
        size = size_t()
        self.library.check(self.library.c.pbsattn_plan_cache_size(self.handle, i64(tokens), ctypes.byref(size)))
        return SegmentCache(self.library, size.value) if size.value else None

    def _run(self, q, k, v, out, lse, stats, table, cache=None, valid=0):
        call = Run(
            *(ctypes.pointer(view(t)) for t in (q, k, v, out)),
            pointer(lse),
            pointer(self.workspace),
            self.workspace_size,
            torch.cuda.current_stream().cuda_stream,
            None if stats is None else ctypes.pointer(stats),
            None,
            None
            if self.weights is None
            else ctypes.pointer(OrderWeights(pointer(self.weights), self.weights.numel(), 0, 0)),
        )
        if table is not None:
            call.pages = ctypes.pointer(Pages(pointer(table), table.stride(0), k.shape[2], k.shape[0]))
        if cache is not None:
            call.cache, call.cache_valid = cache.handle, valid
        self.library.check(self.library.c.pbsattn_plan_run(self.handle, ctypes.byref(call)))

    def __call__(self, q, k, v, out, lse=None, table=None, cache=None, valid=0):
        """table: int32 [batch, pages], where k and v are [page, head, place, width]. cache: what earlier runs left of the
        first `valid` tokens."""
        self._run(q, k, v, out, lse, None, table, cache, valid)

    def stats(self, q, k, v, out, table=None):
        """Runs and waits; returns counts and seconds of each stage."""
        stats = Stats()
        self._run(q, k, v, out, None, stats, table)
        return stats


class SegmentCache:
    """Memory in which runs of plans keep what they make of complete segments."""

    def __init__(self, library, size):
        self.library, self.size = library, size
        self.memory = torch.empty(size, dtype=torch.uint8, device="cuda")
        self.handle = void_p()
        create = library.c.pbsattn_segment_cache_create
        library.check(create(void_p(pointer(self.memory)), size_t(size), ctypes.byref(self.handle)))

    def __del__(self):
        if getattr(self, "handle", None):
            self.library.c.pbsattn_segment_cache_destroy(self.handle)
