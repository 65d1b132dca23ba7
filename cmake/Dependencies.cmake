# Every third-party dependency, with the version we build against. docs/dependencies.md says why each.
find_package(PkgConfig REQUIRED)
find_package(Threads REQUIRED)
find_package(fmt 9 REQUIRED)                                       # library, programs: messages
pkg_check_modules(highway REQUIRED IMPORTED_TARGET libhwy>=1.0.3)  # library: SIMD with run-time dispatch

# Programs link fmt. The library carries what it uses of it, so that nothing is asked of where it goes; but not under
# sanitizers, which would instrument the whole of it in each file.
if(PBSATTN_SANITIZE)
  set(PBSATTN_LIBRARY_FMT fmt::fmt)
else()
  set(PBSATTN_LIBRARY_FMT fmt::fmt-header-only)
endif()

if(PBSATTN_LLAMA_SOURCE OR PBSATTN_BUILD_BENCH OR PBSATTN_BUILD_FUZZ)
  find_package(CLI11 2.1 REQUIRED)  # program, bench: command line
endif()
if(PBSATTN_LLAMA_SOURCE)
  pkg_check_modules(xxhash REQUIRED IMPORTED_TARGET libxxhash>=0.8)  # plug-in: checksums of keys and values
endif()
if(PBSATTN_LLAMA_SOURCE OR PBSATTN_PYTHON OR PBSATTN_BUILD_BENCH OR PBSATTN_BUILD_TESTS OR PBSATTN_BUILD_FUZZ)
  find_package(nlohmann_json 3.11 REQUIRED)  # program, bench, plug-in, files of learned orders: JSON
endif()
if(PBSATTN_BUILD_TESTS)
  find_package(GTest 1.12 REQUIRED)  # tests
endif()
if(PBSATTN_CUDA)
  set(CMAKE_CUDA_ARCHITECTURES OFF)  # targets name theirs: 90a, which CMake 3.25 doesn't know
  enable_language(CUDA)
  if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)  # nor that nvcc has C++20
    set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION -std=c++20)
    set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION -std=c++20)
  endif()
  find_package(CUDAToolkit 12.8 REQUIRED)  # library: the CUDA runtime, linked statically
endif()
