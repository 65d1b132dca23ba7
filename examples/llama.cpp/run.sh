#!/bin/sh
# A text's perplexity by an unmodified llama.cpp, without and with the plug-in:
#   run.sh PLUGIN LLAMA_BIN MODEL TEXT [CONTEXT]
# PLUGIN is the folder that holds libggml-pbsattn.so, LLAMA_BIN the one that holds llama-perplexity. The text needs twice
# CONTEXT tokens (8192 unless given).
set -eu
plugin=$1 bin=$2 model=$3 text=$4 context=${5:-8192}

# The prompt has to be one micro-batch: each is permuted and selected by itself.
perplexity() {
  "$bin/llama-perplexity" -m "$model" -f "$text" -c "$context" -b "$context" -ub "$context" --chunks 1 2>&1 |
    grep -E 'Final estimate|pbsattn'
}

echo "llama.cpp's own attention:"
perplexity
echo "pbsattn:"
# Builds with compiled-in backends don't look for others, so the plug-in is preloaded; official releases need GGML_BACKEND_PATH alone.
LD_PRELOAD="$plugin/libggml-pbsattn-preload.so" GGML_BACKEND_PATH="$plugin/libggml-pbsattn.so" PBSATTN_STATS=1 perplexity
