// Which of cuBLASLt's algorithms a matrix product takes, where that was found by timing. Shared by matmul.cuh, its CPU twin, which
// has none, and data/matmul_plans.h, which keeps them in a file.
#pragma once
#include <array>
#include <cstdint>
#include <map>
#include <string>

struct MatmulChoice {
    std::array<uint64_t, 8> algorithm;        // cuBLASLt's words; they mean the same to the same version of the library
    double ms = 0, first_ms = 0;              // a call with it, and with the heuristic's first answer
};
using MatmulChoices = std::map<std::string, MatmulChoice>;   // by name of the shape
