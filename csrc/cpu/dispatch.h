// Which instruction set the CPU kernels run with: the best one this CPU has, or a lower one on request.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "blocks.h"

namespace edge::cpu {

// What the CPU and the operating system offer, by name.
std::vector<std::pair<std::string, bool>> features();

// The instruction sets this build has and this CPU can run, lowest first.
std::vector<const InstructionSet*> available();

// The one in use. The first call reads EDGE_KERNELS_ISA; throws std::invalid_argument if that names no available one.
const InstructionSet& instruction_set();

// Changes it for the calls that follow; throws std::invalid_argument for a name that is not available.
void use_instruction_set(const std::string& name);

}  // namespace edge::cpu
