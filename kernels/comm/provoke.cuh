// For tests: provokes what missing events would do now and then.
//   SAMBA_TEST_DELAY=MICROSECONDS           every collective first makes its data unreadable for so long, on its own stream: a kernel that
//                                           does not wait for it reads garbage, one that it does not wait for is undone
//   SAMBA_TEST_DELAY_COMPUTE=MICROSECONDS   the computing stream comes late
//   SAMBA_TEST_DROP=WHAT                    the event of this name is left out
#pragma once
#include "../device.cuh"
#include "launch.h"

class Provoke {
    int delay_ = 0, delay_compute_ = 0;
    std::string dropped_;
    void* copy_ = nullptr;
    int64_t bytes_ = 0;

public:
    void start() {
        delay_ = env_number("SAMBA_TEST_DELAY", 0);
        delay_compute_ = env_number("SAMBA_TEST_DELAY_COMPUTE", 0);
        if (const char* event = std::getenv("SAMBA_TEST_DROP")) dropped_ = event;
    }
    bool drops(const char* event) const { return dropped_ == event; }
    void delay_compute(Stream compute) const { if (delay_compute_) stream_delay(compute, delay_compute_); }
    void disturb(void* data, int64_t bytes, Stream stream) {
        if (!delay_ || bytes <= 0) return;
        if (bytes > bytes_) {
            stream_sync(stream);
            if (copy_) device_free(copy_);
            copy_ = device_alloc((size_t)bytes, "the copy of SAMBA_TEST_DELAY");
            bytes_ = bytes;
        }
        copy_on_device(copy_, data, (size_t)bytes, stream);
        device_fill(data, 0xff, (size_t)bytes, stream);
        stream_delay(stream, delay_);
        copy_on_device(data, copy_, (size_t)bytes, stream);
    }
};
