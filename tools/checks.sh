# Sanitizers, fuzzing, and what is too long for CI. ./dev sources this file, and its functions are that file's too.

# Tests that run the llama.cpp plug-in or the program.
with_llama='^(ggml_|app_)'

# ---------------------------------------------------------------------------------------------- sanitizers

sanitize() {
  case ${1:-} in
    '')
      sanitize_address
      sanitize_thread
      ;;
    address | thread | python | gpu) "sanitize_$@" ;;
    plugin) sanitize_plugin asan ;;
    plugin-thread) sanitize_plugin tsan ;;
    *) fail "sanitize $1: no such part; there are address, thread, plugin, plugin-thread, python and gpu" ;;
  esac
}

sanitize_address() {
  build asan
  # SSE4 is AVX2's code on shorter vectors; `./dev test` runs it.
  GTEST_FILTER='-*sse4*' tested asan -j "$(nproc)" -E "$with_llama"
}

sanitize_thread() {
  build tsan cpu_plan_test
  # What only this sanitizer finds lies between threads: thread counts, concurrent runs, caps.
  GTEST_FILTER='*SameBits*:*Threads*' tested tsan -R '^cpu_plan_test$'
}

# sanitize_plugin asan|tsan: our code alone is built so. llama.cpp isn't, so its tools can't load our plug-in here.
sanitize_plugin() {
  setup
  configure "$1" --llama-libraries
  step "building the plug-in and the program, $1"
  cmake --build --preset "$1" --target ggml_test ggml_memory_test ggml_model_test app_parts_test pbsattn-cli
  test_data
  TSAN_OPTIONS="suppressions=$PWD/tests/ggml/tsan.supp" GTEST_FILTER='-Tools.*' tested "$1" -R "$with_llama"
}

sanitize_python() {
  local python preload=() library
  setup
  python=$(tools/venv.py tests)
  install_python "$python" build/python-sanitized/site --no-build-isolation \
    --config-settings='build-dir=build/python-sanitized/{wheel_tag}' --config-settings=cmake.build-type=RelWithDebInfo \
    --config-settings='cmake.define.CMAKE_CXX_FLAGS_RELWITHDEBINFO=-O1 -g1' \
    --config-settings=cmake.define.PBSATTN_CUDA=OFF --config-settings=cmake.define.PBSATTN_SANITIZE=address,undefined
  # Python itself isn't sanitized: the runtime has to be there before it, and beside it what exceptions are thrown with.
  for library in libasan.so libstdc++.so; do
    preload+=("$(readlink -f "$(g++ -print-file-name=$library)")")
  done
  step "testing the Python package"
  # Python and PyTorch keep memory to their end.
  LD_PRELOAD="${preload[*]}" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
    PYTHONPATH=$PWD/build/python-sanitized/site "$python" -m pytest -q -rs \
    tests/python/test_op.py tests/python/test_errors.py tests/python/test_settings.py \
    --junitxml build/python-sanitized/tests.xml
  tools/skips.py build/python-sanitized/tests.xml
}

# Small tests that together launch every kernel: dense and sparse, each score, corrections, methods of whole heads.
gpu_tests='*/dense_n257:*/pbs_n257:*/pbs_chunk100:*/shared_order:*/segment1024:*/per_query_shared_order'
gpu_tests+=':Masses/*_one_query:Masses/*_chunk:*/flashprefill_chunk:*/corrected_permuted_dim128'
gpu_tests+=':Methods/*_queries31:Methods/*_chunk'

# sanitize_gpu [PROGRAM]: cuda_test, or one that was built elsewhere.
sanitize_gpu() {
  local tool sanitizer program=${1:-build/cuda/tests/cuda/cuda_test} toolkit=${CUDA_PATH:-/usr/local/cuda} failed=()
  sanitizer=$(PATH=$PATH:$toolkit/bin:$toolkit/compute-sanitizer command -v compute-sanitizer) ||
    fail "no compute-sanitizer on PATH or in $toolkit; install the CUDA toolkit's package cuda-sanitizer"
  nvidia-smi >/dev/null 2>&1 || fail "no GPU here (nvidia-smi finds none); run it on a machine with a Hopper GPU"
  (($#)) || build_cuda cuda_test
  [[ -x $program ]] || fail "$program: no such program; name the cuda_test that a build of the preset cuda made"
  local filter=${GTEST_FILTER:-$gpu_tests}
  "$program" --gtest_list_tests --gtest_filter="$filter" | grep -q '^ ' || fail "no test of $program is called $filter"
  for tool in memcheck racecheck initcheck synccheck; do
    step "compute-sanitizer $tool"
    "$sanitizer" --tool "$tool" --error-exitcode 99 "$program" --gtest_brief=1 --gtest_filter="$filter" || failed+=("$tool")
  done
  ((${#failed[@]} == 0)) || fail "sanitize gpu: ${failed[*]} failed; what they found is above"
  step "memcheck, racecheck, initcheck and synccheck found nothing"
}

# ------------------------------------------------------------------------------------------------ fuzzing

# fuzz [SECONDS [TARGET...]]
fuzz() {
  local seconds=${1:-60} target log input found=build/fuzz/found targets=() failed=()
  [[ $seconds =~ ^[1-9][0-9]*$ ]] || fail "fuzz $seconds: no number of seconds from 1 up"
  install_packages clang
  install_packages "libclang-rt-$(clang -dumpversion | cut -d. -f1)-dev" # libFuzzer and the sanitizers
  build fuzz
  for target in build/fuzz/tests/fuzz/*_fuzz; do
    [[ -f $target && -x $target ]] && targets+=("$(basename "$target")")
  done
  for target in "${@:2}"; do
    [[ " ${targets[*]} " == *" $target "* ]] || fail "fuzz target \"$target\": no such target; there are ${targets[*]}"
  done
  (($# < 2)) || targets=("${@:2}")
  mkdir -p "$found"
  for target in "${targets[@]}"; do
    step "fuzzing $target for $seconds s"
    log=$found/$target.log
    mkdir -p "build/fuzz/corpus/$target"
    if "build/fuzz/tests/fuzz/$target" -max_total_time="$seconds" -max_len=4096 -len_control=0 -timeout=60 -print_final_stats=1 \
      -artifact_prefix="$found/$target-" "build/fuzz/corpus/$target" "tests/fuzz/corpus/$target" >"$log" 2>&1; then
      grep -aE '^(FUZZ:|Done|stat::(number_of_executed|average_exec|peak_rss))' "$log"
    else
      # All that it said but its progress.
      grep -avE '^#[0-9]+\s|^\s*NEW_(FUNC|PC)' "$log" || true
      failed+=("$target")
      input=$(sed -n 's/.*Test unit written to //p' "$log" | tail -n 1)
      step "$target failed; its log is $log; again: build/fuzz/tests/fuzz/$target ${input:-(no single input)}"
    fi
  done
  ((${#failed[@]} == 0)) || fail "fuzz: ${failed[*]} failed; what they found is above"
}

# ------------------------------------------------------------------------------------- too long for CI

check_parts=(address thread plugin plugin-thread python fuzz models vllm sglang paths tests repeats)
left_out=77 # the exit status of a part that can't be run here: named alone it fails, among several it is left out

# check [--fuzz-seconds N] [PART...]: one part is run as it is; of several, each by itself, with a log, and a table at the end.
check() {
  local part start log code failed=() summary=() status
  if [[ ${1:-} == --fuzz-seconds ]]; then
    [[ ${2:-} =~ ^[1-9][0-9]*$ ]] || fail "--fuzz-seconds ${2:-}: no number of seconds from 1 up"
    export PBSATTN_FUZZ_SECONDS=$2
    shift 2
  fi
  for part; do
    [[ " ${check_parts[*]} gpu " == *" $part "* ]] || fail "check $part: no such part; there are ${check_parts[*]} and gpu"
  done
  if (($# == 1)); then
    check_part "$1"
    return
  fi
  (($#)) || set -- "${check_parts[@]}"
  mkdir -p build/check
  for part; do
    start=$SECONDS log=build/check/$part.log code=0
    step "check $part"
    ./dev check "$part" 2>&1 | tee -i "$log" || code=$?
    case $code in
      0) status=passed ;;
      "$left_out") status='left out' ;;
      *)
        status=FAILED
        failed+=("$part")
        ;;
    esac
    summary+=("$(printf '%-14s %-8s %6d s' "$part" "$status" $((SECONDS - start)))")
    while IFS= read -r line; do summary+=("    $line"); done < <(counts "$log")
  done
  printf '%s\n' "==== check" "${summary[@]}"
  ((${#failed[@]} == 0)) || fail "check: ${failed[*]} failed; their logs are in build/check"
}

# What a log counts: tests of CTest and pytest, inputs of fuzzers, classes of models.
counts() {
  grep -aE '% tests passed|^[0-9]+ (passed|failed)|^FUZZ:|^Done [0-9]+ runs|classes|ERROR SUMMARY|RACECHECK SUMMARY' "$1" || true
}

check_part() {
  case $1 in
    address | plugin | plugin-thread | python | gpu) sanitize "$1" ;;
    thread)
      build tsan core_test cpu_plan_test capi_test
      tested tsan -R '^(core_test|cpu_plan_test|capi_test)$'
      ;;
    fuzz) fuzz "${PBSATTN_FUZZ_SECONDS:-600}" ;;
    models) on_tests_python tests/models --all ;;
    vllm) check_server vllm "vLLM for the CPU" ;;
    sglang) check_server sglang SGLang ;;
    paths) check_paths ;;
    tests) for _ in 1 2 3; do run_tests; done ;;
    repeats)
      build release
      test_data
      ctest --preset release -R '^(ggml_model_test|app_test)$' --repeat until-fail:20
      ;;
  esac
}

# check_server NAME WHAT: a server's engine on the CPU, with the plug-in as it is installed.
check_server() {
  local python
  setup
  if ! python=$(tools/venv.py "$1"); then
    step "$2 can't be had here: the plug-in in its engine is not tested"
    exit "$left_out"
  fi
  install_python "$(tools/venv.py tests)" build/python/site --no-build-isolation --config-settings=cmake.define.PBSATTN_CUDA=OFF
  PYTHONPATH=$PWD/build/python/site "$python" -m pytest -q --show-capture=no "tests/$1" --junitxml "build/python/$1.xml"
  tools/skips.py "build/python/$1.xml"
}

check_paths() {
  local path paths
  build release
  test_data
  paths=$(build/release/apps/pbsattn/pbsattn devices --json |
    python3 -c 'import json, sys; print(*json.load(sys.stdin)[0]["paths"])')
  for path in $paths; do
    step "testing with PBSATTN_CPU_PATH=$path"
    PBSATTN_CPU_PATH=$path tested release -j "$(nproc)"
    PBSATTN_CPU_PATH=$path python_tests
  done
  step "testing with AMX in plain C++"
  configure release --llama-tools -B build/amx -DPBSATTN_EMULATE_AMX=ON -DPBSATTN_BUILD_BENCH=OFF
  cmake --build build/amx
  PBSATTN_CPU_PATH=amx_bf16 ctest --test-dir build/amx --output-on-failure -j "$(nproc)" --output-junit "$PWD/build/amx/tests.xml"
  tools/skips.py build/amx/tests.xml build/amx/Testing/Temporary/LastTest.log
}
