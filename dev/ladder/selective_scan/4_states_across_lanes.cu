// 4. States across lanes. Four neighbouring lanes share a channel and keep 4 of its 16 states each: four times as many warps (5.8 for each
// scheduler), a quarter of the registers. The price: y_t = C_t . h_t is now a sum over lanes. Four steps are added
// together, so that it costs 3 shuffles for four steps instead of 8, and leaves step q in lane q, which finishes it (sum_lanes in lanes.cuh).
//
// What limits it: the special-function unit, 16 results a clock and multiprocessor. It owes one exponential for each state update, and
// softplus and gate on top: 1.25 for each update, 0.48 ms at 1.98 GHz. All instructions together, 12 for each update, take 0.58 ms to issue.
#include "lanes.cuh"

int main() {
    using namespace scan;
    return run({"4 states across lanes", [](const Inputs& p, const Outputs& r) { lanes_forward(p, r.out, nullptr); }});
}
