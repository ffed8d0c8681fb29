// What each operation of a step costs. A launcher's first line names it, with the bytes and flops of its file's head:
//     const Operation op("rmsnorm forward", N * d * 6.0, 0, stream);
// While that object lives, its launches are timed if somebody records, and are a range of Nsight's timeline if that profiles. Else
// the line costs next to nothing. Bound: what the data sheet's rates allow at best, the largest of bytes, flops and
// special-function evaluations (exp and its like: 16 a clock and multiprocessor) over theirs.
#pragma once
#include <string>
#include <vector>

#include "device.cuh"

#ifndef SAMBA_CPU
#include <nvtx3/nvToolsExt.h>
#endif

// A range of the profiler's timeline, from here to the end of the block
class ProfilerRange {
public:
#ifdef SAMBA_CPU
    explicit ProfilerRange(const std::string&) {}
#else
    explicit ProfilerRange(const std::string& name) { nvtxRangePushA(name.c_str()); }
    ~ProfilerRange() { nvtxRangePop(); }
#endif
    ProfilerRange(const ProfilerRange&) = delete;
    ProfilerRange& operator=(const ProfilerRange&) = delete;
};

// The calls of a step in order, each between two marks of the stream
struct Recorder {
    struct Call {
        std::string name;
        double bytes, flops, special;
        Timer begin, end;
    };
    std::vector<Call> calls;
    inline static Recorder* active = nullptr;              // who records: nobody, but for a benchmark

    Recorder() = default;
    Recorder(const Recorder&) = delete;
    Recorder& operator=(const Recorder&) = delete;
    ~Recorder() {
        if (active == this) active = nullptr;
        for (Call& call : calls) {
            timer_destroy(call.begin);
            timer_destroy(call.end);
        }
    }
};

class Operation {
    [[maybe_unused]] ProfilerRange range;
    Stream stream;
    Recorder* recorder;
    size_t index = 0;

public:
    Operation(const std::string& name, double bytes, double flops, Stream stream, double special = 0)
        : range(name), stream(stream), recorder(Recorder::active) {
        if (!recorder) return;
        index = recorder->calls.size();
        recorder->calls.push_back({name, bytes, flops, special, timer_create(), timer_create()});
        timer_record(recorder->calls[index].begin, stream);
    }
    ~Operation() {
        if (recorder) timer_record(recorder->calls[index].end, stream);
    }
    Operation(const Operation&) = delete;
    Operation& operator=(const Operation&) = delete;
};
