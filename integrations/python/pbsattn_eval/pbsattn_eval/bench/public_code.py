"""What the methods' own public code chooses, run on the CPU from checkouts that the user names.

Functions are taken out of its files by name and run as they stand there, so that nothing beside them (kernels, CUDA, whole
models) has to be importable. An adapter turns (q, k, options) into what those functions take, and their result into a
Choice; q and k are [1, heads, tokens, head_dim], and options are the method's.
"""

import ast
import dataclasses
import importlib.util
import math
import os
import subprocess
import sys
import types
import typing
from collections.abc import Callable

import torch
import torch.nn.functional as F

BLOCK = 128


@dataclasses.dataclass
class Choice:
    kept: torch.Tensor  # bool [heads, rows, blocks]
    # [heads, rows, blocks], by whose sums up to a share of a row blocks were kept: any of them keeps a block. () where the
    # code doesn't decide so, or doesn't give them
    scores: tuple[torch.Tensor, ...] = ()


class _OnCpu(ast.NodeTransformer):
    """The device "cuda", wherever it is named, becomes the CPU."""

    def visit_Constant(self, node):
        return ast.copy_location(ast.Constant("cpu"), node) if node.value == "cuda" else node


def functions(path, *names, inside=None, **known):
    """Functions of a file by name, or those inside another function of it, which find each other and `known`."""
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    bodies = [tree.body] if inside is None else [f.body for f in _defined(tree.body, [inside])]
    chosen = [f for body in bodies for f in _defined(body, names)]
    if missing := set(names) - {f.name for f in chosen}:
        raise ValueError(
            f"{path}: has no function {', '.join(sorted(missing))}; check out the commit that docs/methods.md names"
        )
    for function in chosen:
        function.decorator_list = []
    space = {"torch": torch, "F": F, "math": math, **vars(typing), **known}
    exec(compile(_OnCpu().visit(ast.Module(chosen, [])), str(path), "exec"), space)  # the user's own checkout
    return types.SimpleNamespace(**{name: space[name] for name in names}, space=space)


def _defined(body, names):
    return [node for node in body if isinstance(node, ast.FunctionDef) and node.name in names]


def _padded(x):
    return F.pad(x, (0, 0, 0, -x.shape[2] % BLOCK))


# ------------------------------------------------------------------------------------------------ methods


def _pbs(folder, q, k, options):
    source = folder / "pbs_attn/src"
    utils = functions(source / "utils.py", "block_pooled_attn", "select_blocks")
    permute = functions(source / "permute_states.py", "last_block_attn_sorting", "apply_permutation")
    choose = functions(
        source / "pbs.py", "first_token_mask", "permuted_block_selection", **vars(utils)
    ).permuted_block_selection
    moved, order = permute.apply_permutation(q, k, BLOCK, options["segment"])
    tokens = torch.arange(q.shape[2]).expand(1, q.shape[1], -1)
    scores, kept, own = choose(q, moved, tokens, order, BLOCK, options["segment"], options["top_p"])
    return Choice((kept | own)[0], (scores[0],))


def _mean_pool(folder, q, k, options):
    code = functions(folder / "pbs_attn/src/utils.py", "block_pooled_attn", "select_blocks")
    q, k = _padded(q), _padded(k)
    rows = q.shape[2] // BLOCK
    mask = torch.ones(rows, rows, dtype=torch.bool).tril()
    scores = code.block_pooled_attn(q, k, BLOCK, mask)
    kept = code.select_blocks(scores, options["top_p"])[0] | torch.eye(rows, dtype=torch.bool)
    kept[:, :, 0] = True
    return Choice(kept, (scores[0],))


_XATTENTION_CHUNK = 512  # queries that its code takes at a time; a length that is no multiple of it is padded


def _xattention(folder, q, k, options):
    source = folder / "xattn/src"
    utils = functions(source / "utils.py", "find_blocks_chunked")
    code = functions(source / "Xattention.py", "xattn_estimate", find_blocks_chunked=utils.find_blocks_chunked)
    if q.shape[2] % _XATTENTION_CHUNK == 0:  # its mask of padding, [-0:], would then be of everything
        raise ValueError(
            f"{q.shape[2]} tokens: x-attention's PyTorch path needs padding; "
            f"pass a length that is no multiple of {_XATTENTION_CHUNK}"
        )
    scores, kept = code.xattn_estimate(
        q, k, BLOCK, 8, threshold=options["top_p"], chunk_size=_XATTENTION_CHUNK, use_triton=False
    )
    rows = -(-q.shape[2] // BLOCK)
    return Choice(kept[0, :, :rows, :rows], (scores[0, :, :rows, :rows],))


def _prism(folder, q, k, options):
    width = q.shape[3]
    known = {
        "LOW_FREQ_DIM": width * 3 // 4,
        "HIGH_FREQ_DIM": width // 2,
        "BLOCK_SIZE": BLOCK,
        "LOW_FREQ_THRESHOLD": options["top_p"],
        "HIGH_FREQ_THRESHOLD": options["top_p"],
        "LOW_FREQ_TEMP": 1.0,
        "HIGH_FREQ_TEMP": 1.0,
        "CALIBRATE": True,
        "FORCE_SINK": True,
        "FORCE_RECENT": True,
        "USE_TRITON_SELECT": False,
        "USE_TRITON_LOGITS": False,
    }
    names = ("mean_pool", "get_low_freq_components", "get_high_freq_components", "top_p_select", "prism_block_estimate")
    code = functions(folder / "prism/prism.py", *names, **known)
    scores = []
    select = code.top_p_select

    def watched(probabilities, *args, **kwargs):
        scores.extend(probabilities[0].chunk(2, 1))  # the rows of the faster band, then those of the slower one
        return select(probabilities, *args, **kwargs)

    code.space["top_p_select"] = watched
    kept = code.prism_block_estimate(_padded(q), _padded(k))
    return Choice(kept[0], tuple(scores))


def _minference(folder, q, k, options):
    """Its columns and diagonals, as blocks of 128."""
    path = folder / "minference/modules/minference_forward.py"
    tokens = q.shape[2]
    found = {}

    def keep(_q, _k, _v, columns, diagonals):
        found.update(columns=columns.flatten(), diagonals=diagonals.flatten())

    ahead = torch.arange(64)
    known = {
        "q_len": tokens,
        "self": types.SimpleNamespace(head_dim=q.shape[3]),
        "vertical_slash_sparse_attention": keep,
        "LAST_Q_MASK": ahead[:, None] >= ahead,
        **vars(functions(path, "sum_all_diagonal_matrix")),
    }
    kernel = functions(
        path, "vertical_and_slash_kernel", inside="gather_last_q_vertical_slash_topk_v4", **known
    ).vertical_and_slash_kernel
    rows = -(-tokens // BLOCK)
    kept = torch.zeros(q.shape[1], rows, rows, dtype=torch.bool)
    first = torch.arange(rows) * BLOCK  # query of each row, key of each block
    last = (first + BLOCK).clamp(max=tokens) - 1
    for head in range(q.shape[1]):
        one = slice(head, head + 1)
        kernel(q[:, one], k[:, one], k[:, one], options["vertical"], options["slash"])
        kept[head, :, found["columns"] // BLOCK] = True
        before = F.pad(torch.bincount(found["diagonals"], minlength=tokens).cumsum(0), (1, 0))  # diagonals of less distance
        nearest, farthest = first[:, None] - last, last[:, None] - first
        kept[head] |= before[(farthest + 1).clamp(min=0)] > before[nearest.clamp(min=0)]
    return Choice(kept)


def _flexprefill(folder, q, k, options):
    def pool(x, size):
        """Means of blocks, as its Triton kernel of this name has them."""
        parts = [part.float().mean(1, keepdim=True) for part in x.split(size, 1)]
        return torch.cat(parts, 1).to(x.dtype)

    path = folder / "flex_prefill/ops/flex_prefill_attention.py"
    names = (
        "score_cover_topk",
        "score_cover_idx",
        "sum_all_diagonal_matrix",
        "transform_veritcal_slash_idx",
        "torch_bhn_sumpool",
        "square_root_js_divergence",
        "get_active_blocks",
    )
    code = functions(path, *names, rearrange=lambda x, _: x.flatten(1, 2), triton_bnhd_pool=pool, causal_mask=None)
    q, k = q.transpose(1, 2).contiguous(), k.transpose(1, 2).contiguous()
    rows = -(-q.shape[1] // BLOCK)
    chosen = code.get_active_blocks(
        q, k, None, BLOCK, options["top_p"], math.ceil(options["min_budget"] / BLOCK), rows, options["tau"]
    )
    kept = torch.zeros(q.shape[2], rows * rows, dtype=torch.bool)
    for head, blocks in enumerate(chosen[0]):
        kept[head, blocks.long()] = True
    return Choice(kept.view(-1, rows, rows))


def _flashprefill(folder, q, k, options):
    """Its selection is a Triton kernel, which Triton's interpreter runs on the CPU."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            "flashprefill: its public code runs in Triton's interpreter; set TRITON_INTERPRET=1 before Python starts, "
            "as ./dev bench lists does"
        )
    code = _module(folder / "flashprefill_ops/flash_block_sparse_index_triton.py")
    _, heads, tokens, width = q.shape
    rows = -(-tokens // BLOCK)
    space = code.SparseIndexWorkspace(
        batch_size=1,
        num_kv_heads=heads,
        head_dim=width,
        total_q_tiles=rows,
        max_q_tiles=rows,
        max_k_blocks=rows,
        dtype=q.dtype,
        device=q.device,
        cu_q_tiles=torch.zeros(2, dtype=torch.int32),
        n_sub=2,
    )

    def number(*values):
        return torch.tensor(values, dtype=torch.int32)

    page = math.gcd(tokens, 64)
    pages = k[0].transpose(0, 1).reshape(tokens // page, page, heads, width)
    begin, index, _, _ = code.build_block_sparse_index_fast(
        q[0].transpose(0, 1).contiguous(),
        pages,
        torch.arange(tokens // page, dtype=torch.int32)[None],
        number(tokens),
        number(0, tokens),
        space,
        k_block_m=BLOCK,
        k_block_n=BLOCK,
        abs_threshold=options["threshold"],
        attention_sink=options["sink_blocks"],
        window_size=options["local_blocks"],
        last_n_blocks=options["dense_last_rows"],
    )
    kept = torch.zeros(heads * rows, rows, dtype=torch.bool)
    for i in range(heads * rows):
        kept[i, (index[begin[i] : begin[i + 1]] // 2).long()] = True
    return Choice(kept.view(heads, rows, rows))


def _module(path):
    """A file as a module: Triton reads its kernels' source, so they can't be taken out."""
    name = f"_public_{path.stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[name] = module
    return sys.modules[name]


# ------------------------------------------------------------------------------------------------- table


@dataclasses.dataclass(frozen=True)
class PublicCode:
    repository: str  # owner/name on GitHub
    commit: str  # that docs/methods.md speaks of
    function: str  # what decides there
    cases: tuple[str, ...]  # our method with settings
    choose: Callable  # (folder, q, k, options) -> Choice
    first_row: int = 0  # rows before it are not counted: why is in docs/methods.md
    bf16: bool = True  # whether it runs in bf16 here

    def checkout(self, public):
        """The folder that the code lies in, below one for all: owner+name, or name."""
        names = (self.repository.replace("/", "+"), self.repository.split("/")[1])
        return next((public / name for name in names if (public / name).is_dir()), None)


CODES = {
    "pbs": PublicCode("xinghaow99/pbs-attn", "8ce8e024b", "permuted_block_selection", ("pbs", "pbs:top_p=0.6"), _pbs),
    "mean-pool": PublicCode(
        "xinghaow99/pbs-attn", "8ce8e024b", "select_blocks, with block 0 and the diagonal", ("mean-pool",), _mean_pool
    ),
    "xattention": PublicCode(
        "mit-han-lab/x-attention",
        "e37988770",
        "xattn_estimate, stride 8",
        ("xattention",),
        _xattention,
        first_row=_XATTENTION_CHUNK // BLOCK,
    ),
    "prism": PublicCode("xinghaow99/prism", "d5a425260", "prism_block_estimate", ("prism",), _prism),
    "minference": PublicCode(
        "microsoft/MInference",
        "fb56c917f",
        "vertical_and_slash_kernel, its choice as blocks",
        ("minference:vertical=100:slash=800", "minference:vertical=40:slash=110"),
        _minference,
    ),
    "flexprefill": PublicCode(
        "bytedance/FlexPrefill",
        "a24b27bf1",
        "get_active_blocks",
        tuple(f"flexprefill:tau={tau}:min_budget={least}" for tau in (0, 0.1, 1) for least in (1, 1024)),
        _flexprefill,
    ),
    "flashprefill": PublicCode(
        "qhfan/FlashPrefillv2", "0f8e791f6", "build_block_sparse_index_fast", ("flashprefill",), _flashprefill, bf16=False
    ),  # Triton's interpreter multiplies the bits of bf16 numbers
}


def commit_of(folder):
    """Short name of the commit that a checkout is at, and whether files were changed; None where git doesn't know."""

    def git(*command):
        return subprocess.run(["git", "-C", str(folder), *command], capture_output=True, text=True)

    head = git("rev-parse", "--short=9", "HEAD")
    if head.returncode != 0:
        return None
    return head.stdout.strip() + ("+" if git("diff", "HEAD", "--name-only", "--diff-filter=M").stdout.strip() else "")
