# pbsattn_exports(TARGET PATTERN...): a shared library exports the symbols that match (globs of mangled names) and are not
# hidden, and no others. Visibility alone doesn't do: templates of other libraries that are instantiated here, and archives
# that are linked in, libstdc++'s own where g++ links it statically, bring default visibility with them. A process would then
# take its operator delete, or half of its streams, from us.
function(pbsattn_exports target)
  get_target_property(type ${target} TYPE)
  if(APPLE OR NOT type MATCHES "SHARED_LIBRARY|MODULE_LIBRARY")
    return()
  endif()
  set(global "")
  if(ARGN)
    list(JOIN ARGN "; " global)
    set(global "global: ${global}; ")
  endif()
  set(script ${CMAKE_CURRENT_BINARY_DIR}/${target}.exports)
  file(CONFIGURE OUTPUT ${script} CONTENT "{ ${global}local: *; };\n")
  target_link_options(${target} PRIVATE LINKER:--version-script=${script})
  set_property(TARGET ${target} APPEND PROPERTY LINK_DEPENDS ${script})
endfunction()
