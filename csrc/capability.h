// Which kernels run: those of the widest vectors that were built and that this processor has, unless told otherwise.
#pragma once

#include <string>
#include <vector>

#include "problem.h"

namespace sinkhorn {

std::vector<std::string> capabilities();            // usable here, the narrowest first
std::string capability();                           // in use
void set_capability(const std::string& requested);  // throws std::invalid_argument if it is not usable
const KernelTable& kernels();

}  // namespace sinkhorn
