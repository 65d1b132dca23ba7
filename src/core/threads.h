#pragma once

namespace pbsattn {

// Processors this process may run on (its affinity mask, not the machine's size); at least 1.
int available_processors();

}  // namespace pbsattn
