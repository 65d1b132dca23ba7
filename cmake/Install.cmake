# Installs the library, its headers, and what find_package(pbsattn) and pkg-config need.
include(CMakePackageConfigHelpers)

install(TARGETS pbsattn EXPORT pbsattn
  ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR} LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(DIRECTORY include/pbsattn DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})

set(pbsattn_package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/pbsattn)
install(EXPORT pbsattn NAMESPACE pbsattn:: FILE pbsattn-targets.cmake DESTINATION ${pbsattn_package_dir})
configure_package_config_file(cmake/pbsattn-config.cmake.in ${PROJECT_BINARY_DIR}/pbsattn-config.cmake
  INSTALL_DESTINATION ${pbsattn_package_dir})
write_basic_package_version_file(${PROJECT_BINARY_DIR}/pbsattn-config-version.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/pbsattn-config.cmake ${PROJECT_BINARY_DIR}/pbsattn-config-version.cmake
  DESTINATION ${pbsattn_package_dir})

# Whoever links the static library links what it uses, too, so pkg-config names that without --static.
if(NOT BUILD_SHARED_LIBS)
  set(pbsattn_pc_requires "libhwy >= 1.0.3")
  set(pbsattn_pc_libs "-pthread -lstdc++ -lm")
  if(PBSATTN_CUDA)
    string(PREPEND pbsattn_pc_libs "-L${CUDAToolkit_LIBRARY_DIR} -lcudart_static -lrt -ldl ")
  endif()
endif()
file(RELATIVE_PATH pbsattn_pc_prefix
  ${CMAKE_INSTALL_PREFIX}/${CMAKE_INSTALL_LIBDIR}/pkgconfig ${CMAKE_INSTALL_PREFIX})
configure_file(cmake/pbsattn.pc.in ${PROJECT_BINARY_DIR}/pbsattn.pc @ONLY)
install(FILES ${PROJECT_BINARY_DIR}/pbsattn.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)
