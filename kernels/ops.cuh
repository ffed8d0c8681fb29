// Every operation of the model, under one name: `ops::` is gpu:: in a CUDA build and cpu:: in a CPU build. The cpu::
// twins are plain C++ templates, the definition of each operation; GPU builds see them too, as the tests' oracle.
// A new operation: a header here, its twin in cpu/, a line in both lists below, a test in dev/test/.
#pragma once
#include "device.cuh"
#include "decode/step.h"
#include "measure.cuh"

#include "cpu/adamw.h"
#include "cpu/attention.h"
#include "cpu/bf16.h"
#include "cpu/conv1d.h"
#include "cpu/conv1d_x_proj_backward.h"
#include "cpu/cross_entropy.h"
#include "cpu/decode.h"
#include "cpu/embedding.h"
#include "cpu/fp8.h"
#include "cpu/global_norm.h"
#include "cpu/matmul.h"
#include "cpu/matmul_rope.h"
#include "cpu/matmul_swiglu.h"
#include "cpu/rmsnorm.h"
#include "cpu/rope.h"
#include "cpu/scan_inputs.h"
#include "cpu/selective_scan.h"
#include "cpu/swiglu.h"

#ifdef SAMBA_CPU
namespace ops = cpu;
#else
#include "adamw.cuh"
#include "attention.cuh"
#include "bf16.cuh"
#include "conv1d.cuh"
#include "conv1d_x_proj_backward.cuh"
#include "cross_entropy.cuh"
#include "decode.cuh"
#include "decode/step.cuh"
#include "embedding.cuh"
#include "fp8.cuh"
#include "global_norm.cuh"
#include "matmul.cuh"
#include "matmul_rope.cuh"
#include "matmul_swiglu.cuh"
#include "rmsnorm.cuh"
#include "rope.cuh"
#include "scan_inputs.cuh"
#include "selective_scan.cuh"
#include "swiglu.cuh"
namespace ops = gpu;
#endif
