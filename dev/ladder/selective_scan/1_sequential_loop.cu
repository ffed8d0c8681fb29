// 1. The plain loop, on one core. Every channel c of every sequence is a recurrence of its own over time, with 16 states:
//
//     dt_t = softplus(dt_raw_t + dt_bias)
//     h_t  = exp(dt_t A) h_(t-1) + dt_t B_t u_t        A, B, C, h: 16 numbers; B_t and C_t the same for all channels
//     y_t  = C_t . h_t + D u_t
//     out_t = y_t silu(z_t)
//
// sequential.h has the loops, forward and backward, for any number type. Here they run in float and are compared with themselves in double.
// The unit of work of this whole directory is one update of one state, (t, c, n): an exponential and three multiply-adds.
#include "scan.cuh"

int main() {
    using namespace scan;
    const char* name = "1 sequential loop";
    return ladder::run(name, false, [&] {
        const Sizes s{1, 1024, 64};
        Inputs_of<float> p = initial_parameters(s.e);
        std::vector<float>* arrays[] = {&p.u, &p.dt_raw, &p.z, &p.dout, &p.bc};
        for (int k = 0; k < 5; k++)
            for (int64_t i = 0; i < (k == 4 ? s.rows() * 2 * N : s.elements()); i++)
                arrays[k]->push_back(to_float(from_float<bf16>(bench::random_value(i, SCALES[k], k + 1))));
        auto wide = [](const std::vector<float>& v) { return std::vector<double>(v.begin(), v.end()); };
        const Inputs_of<double> exact{wide(p.u), wide(p.dt_raw), wide(p.z), wide(p.dout), wide(p.bc), wide(p.A_log), wide(p.D), wide(p.dt_bias)};
        const Results_of<double> want = sequential(exact, s);
        for (const bool backward : {false, true}) {
            const auto start = std::chrono::steady_clock::now();
            const Results_of<float> r = sequential(p, s, backward);
            const double ms = std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
            Results_of<double> got(s);
            got.out = wide(r.out), got.du = wide(r.du), got.ddt_raw = wide(r.ddt_raw), got.dz = wide(r.dz);
            got.dbc = wide(r.dbc), got.dA_log = wide(r.dA_log), got.dD = wide(r.dD), got.ddt_bias = wide(r.ddt_bias);
            ladder::print_row(backward ? "1 sequential loop, both passes, 1 x 1024 x 64" : "1 sequential loop, forward, 1 x 1024 x 64", ms,
                              s.elements() * N * 1e-6 / ms, "G updates/s", errors_of(got, want, backward, 1e-5, 1e-5));
        }
    });
}
