// Bytes between two ranks through host memory, by MPI or TCP. Nothing here knows GPUs.
#pragma once
#include <algorithm>
#include <chrono>
#include <thread>
#include <vector>

#ifdef SAMBA_MPI
#define OMPI_SKIP_MPICXX 1
#define MPICH_SKIP_MPICXX 1
#include <mpi.h>
#endif

#include "sockets.h"

struct Transport {
    virtual ~Transport() = default;
    virtual const char* name() const = 0;
    // Sends to one rank and receives from another at the same time. A rank of -1: only the other half.
    virtual void exchange(int to, const void* out, int64_t out_bytes, int from, void* in, int64_t in_bytes) = 0;
};

#ifdef SAMBA_MPI
struct MpiTransport : Transport {
    const char* name() const override { return "MPI"; }
    void exchange(int to, const void* out, int64_t out_bytes, int from, void* in, int64_t in_bytes) override {
        constexpr int64_t PIECE = 1 << 30;         // MPI counts are int
        if (to < 0) out_bytes = 0;
        if (from < 0) in_bytes = 0;
        for (int64_t at = 0; at < std::max(out_bytes, in_bytes); at += PIECE) {
            const int n_out = (int)std::clamp<int64_t>(out_bytes - at, 0, PIECE), n_in = (int)std::clamp<int64_t>(in_bytes - at, 0, PIECE);
            MPI_Request both[2];
            MPI_Irecv((char*)in + at, n_in, MPI_BYTE, n_in ? from : MPI_PROC_NULL, 0, MPI_COMM_WORLD, &both[0]);
            MPI_Isend((const char*)out + at, n_out, MPI_BYTE, n_out ? to : MPI_PROC_NULL, 0, MPI_COMM_WORLD, &both[1]);
            // MPI waits by spinning, which takes the core from a rank that computes where cores are few: sleep after a while
            int done = 0;
            for (int tries = 0; MPI_Testall(2, both, &done, MPI_STATUSES_IGNORE), !done; tries++)
                if (tries > 50) std::this_thread::sleep_for(std::chrono::microseconds(50));
        }
    }
};
#endif

struct TcpTransport : Transport {
    std::vector<Socket> peers;                     // one for each rank but this
    const char* name() const override { return "TCP"; }
    void exchange(int to, const void* out, int64_t out_bytes, int from, void* in, int64_t in_bytes) override {
        const char* o = (const char*)out;
        char* i = (char*)in;
        if (to < 0) out_bytes = 0;
        if (from < 0) in_bytes = 0;
        while (out_bytes > 0 || in_bytes > 0) {
            pollfd wait[2] = {{out_bytes > 0 ? peers[to].fd() : -1, POLLOUT, 0}, {in_bytes > 0 ? peers[from].fd() : -1, POLLIN, 0}};
            if (poll(wait, 2, -1) < 0 && errno != EINTR) fail("poll: %s", strerror(errno));
            constexpr int64_t MOST = 1 << 30;
            if (wait[0].revents) move(to, ::send(wait[0].fd, o, (size_t)std::min(out_bytes, MOST), MSG_NOSIGNAL | MSG_DONTWAIT), o, out_bytes);
            if (wait[1].revents) move(from, ::recv(wait[1].fd, i, (size_t)std::min(in_bytes, MOST), MSG_DONTWAIT), i, in_bytes);
        }
    }

private:
    template <class P> static void move(int peer, ssize_t n, P& p, int64_t& bytes) {
        if (n < 0 && (errno == EAGAIN || errno == EINTR)) return;
        if (n <= 0) {
            const std::string why = n < 0 ? strerror(errno) : "it was closed";
            std::this_thread::sleep_for(std::chrono::seconds(3));                  // whoever watches over that rank knows more and ends the job
            fail("the connection to rank %d is lost: %s", peer, why.c_str());
        }
        p += n;
        bytes -= n;
    }
};
