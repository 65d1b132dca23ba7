# Installs the build into a fresh folder and builds and runs the examples from there: by find_package, and by
# pkg-config with nothing but a compiler. Takes BUILD, SOURCE, WORK, CC, CXX, PKG_CONFIG, and CUDA: whether there must be
# an example of it, which runs where there is a GPU.
function(run)
  execute_process(COMMAND ${ARGN} RESULT_VARIABLE status)
  if(NOT status EQUAL 0)
    string(REPLACE ";" " " line "${ARGN}")
    message(FATAL_ERROR "${line}: ${status}")
  endif()
endfunction()

file(REMOVE_RECURSE ${WORK})
run(${CMAKE_COMMAND} --install ${BUILD} --prefix ${WORK}/prefix)

run(${CMAKE_COMMAND} -S ${SOURCE}/examples -B ${WORK}/build -DCMAKE_PREFIX_PATH=${WORK}/prefix
    -DCMAKE_BUILD_TYPE=Release -DCMAKE_C_COMPILER=${CC} -DCMAKE_CXX_COMPILER=${CXX})
run(${CMAKE_COMMAND} --build ${WORK}/build)
foreach(example prefill prefill_c by_head)
  run(${WORK}/build/${example})
endforeach()
find_program(NVIDIA_SMI nvidia-smi)
if(CUDA AND NVIDIA_SMI)
  run(${WORK}/build/graph)
elseif(CUDA AND NOT EXISTS ${WORK}/build/graph)
  message(FATAL_ERROR "${WORK}/build/graph: not built, though the library has CUDA")
endif()

file(GLOB_RECURSE pc ${WORK}/prefix/*/pbsattn.pc)
get_filename_component(pc_dir ${pc} DIRECTORY)
foreach(query --cflags --libs)
  execute_process(COMMAND ${CMAKE_COMMAND} -E env PKG_CONFIG_PATH=${pc_dir} ${PKG_CONFIG} ${query} pbsattn
    OUTPUT_VARIABLE flags${query} OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
  separate_arguments(flags${query} UNIX_COMMAND "${flags${query}}")
endforeach()
# -rpath serves a shared libpbsattn, which no system folder holds here.
set(libs ${flags--libs} -Wl,-rpath,${pc_dir}/..)
run(${CXX} -std=c++20 -O2 ${SOURCE}/examples/cpp/prefill.cc ${flags--cflags} ${libs} -o ${WORK}/prefill)
run(${CC} -std=c11 -O2 ${SOURCE}/examples/c/prefill.c ${flags--cflags} ${libs} -o ${WORK}/prefill_c)
run(${WORK}/prefill)
run(${WORK}/prefill_c)
