# Reads what a shared library exports: every symbol has to match the regular expression API, and there has to be one,
# unless API is empty. Takes NM, LIBRARY, API.
execute_process(COMMAND ${NM} -D --defined-only --format=posix ${LIBRARY}
  OUTPUT_VARIABLE listed COMMAND_ERROR_IS_FATAL ANY)
string(REGEX MATCHALL "[^\n]+" lines "${listed}")
set(others "")
foreach(line IN LISTS lines)
  string(REGEX REPLACE " .*" "" symbol "${line}")
  if(API STREQUAL "" OR NOT symbol MATCHES "^(${API})$")
    list(APPEND others ${symbol})
  endif()
endforeach()
list(LENGTH others count)
if(count GREATER 0)
  list(SUBLIST others 0 10 first)
  message(FATAL_ERROR "${LIBRARY}: exports ${count} symbol(s) that are none of its API (${API}), among them ${first}; "
                      "cmake/Exports.cmake says how to hide them")
endif()
if(NOT API STREQUAL "" AND NOT lines)
  message(FATAL_ERROR "${LIBRARY}: exports nothing; its API is ${API}")
endif()
