# Every third-party dependency, with the version we build against. docs/dependencies.md says why each.
find_package(PkgConfig REQUIRED)
find_package(Threads REQUIRED)
find_package(fmt 9 REQUIRED)                                       # library: messages
pkg_check_modules(highway REQUIRED IMPORTED_TARGET libhwy>=1.0.3)  # library: SIMD with run-time dispatch

if(PBSATTN_LLAMA_SOURCE OR PBSATTN_BUILD_BENCH)
  find_package(CLI11 2.1 REQUIRED)           # program, bench: command line
  find_package(nlohmann_json 3.11 REQUIRED)  # program, bench: JSON
endif()
if(PBSATTN_BUILD_TESTS)
  find_package(GTest 1.12 REQUIRED)  # tests
endif()
