# Imports llama.cpp from PBSATTN_LLAMA_SOURCE (headers; ggml-backend-impl.h is in no install) and
# PBSATTN_LLAMA_BUILD (shared libraries): targets llama, ggml, ggml-base, and ggml-internal-headers.
include_guard(GLOBAL)

if(NOT EXISTS "${PBSATTN_LLAMA_SOURCE}/ggml/src/ggml-backend-impl.h")
  message(FATAL_ERROR "PBSATTN_LLAMA_SOURCE \"${PBSATTN_LLAMA_SOURCE}\": no ggml/src/ggml-backend-impl.h in it; "
                      "name the top folder of a llama.cpp source tree")
endif()
if(NOT IS_DIRECTORY "${PBSATTN_LLAMA_BUILD}")
  message(FATAL_ERROR "PBSATTN_LLAMA_BUILD \"${PBSATTN_LLAMA_BUILD}\": no such folder; name the build folder of "
                      "${PBSATTN_LLAMA_SOURCE}, built with -DBUILD_SHARED_LIBS=ON")
endif()

function(pbsattn_import_llama_library name)
  find_library(PBSATTN_${name}_LIBRARY ${name} NO_DEFAULT_PATH NO_CACHE
    PATHS "${PBSATTN_LLAMA_BUILD}" PATH_SUFFIXES bin lib lib64)
  if(NOT PBSATTN_${name}_LIBRARY MATCHES "\\.(so|dylib)")
    message(FATAL_ERROR "PBSATTN_LLAMA_BUILD \"${PBSATTN_LLAMA_BUILD}\": no shared lib${name} in it or its bin/; "
                        "build llama.cpp there with -DBUILD_SHARED_LIBS=ON")
  endif()
  # The library's own name, which is what the loader looks for: libggml-base.so.0, not a version's file.
  add_library(${name} SHARED IMPORTED GLOBAL)
  set_target_properties(${name} PROPERTIES IMPORTED_LOCATION "${PBSATTN_${name}_LIBRARY}")
endfunction()

pbsattn_import_llama_library(ggml-base)
pbsattn_import_llama_library(ggml)
pbsattn_import_llama_library(llama)
target_include_directories(ggml-base INTERFACE "${PBSATTN_LLAMA_SOURCE}/ggml/include")
target_compile_definitions(ggml-base INTERFACE GGML_SHARED GGML_BACKEND_SHARED)
target_link_libraries(ggml INTERFACE ggml-base)
target_include_directories(llama INTERFACE "${PBSATTN_LLAMA_SOURCE}/include")
target_compile_definitions(llama INTERFACE LLAMA_SHARED)
target_link_libraries(llama INTERFACE ggml)

add_library(ggml-internal-headers INTERFACE IMPORTED GLOBAL)
target_include_directories(ggml-internal-headers INTERFACE "${PBSATTN_LLAMA_SOURCE}/ggml/src")
