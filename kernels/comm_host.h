// Processes that talk to each other through host memory: who launched us, how to find the others, and bytes between two of them.
//
//   launched by                                          ranks found through     bytes travel by
//   nothing (one process)                                -                       -
//   mpirun, srun --mpi=pmix                              MPI                     MPI
//   RANK, WORLD_SIZE, MASTER_ADDR (torchrun's names),    TCP to rank 0           TCP, one connection for each two ranks
//   or srun without MPI and MASTER_ADDR
//
// MPI is called only when the environment shows it, so that a single process needs none of its services. Nothing here knows GPUs.
#pragma once
#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <arpa/inet.h>
#include <fcntl.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <strings.h>
#include <sys/socket.h>
#include <unistd.h>

#ifdef SAMBA_MPI
#define OMPI_SKIP_MPICXX 1
#define MPICH_SKIP_MPICXX 1
#include <mpi.h>
#endif

#include "device.cuh"

// ---------------------------------------------------------------------------------------------------------------------
// How this process was launched

struct Launch {
    enum How { single, mpi, tcp } how = single;
    int rank = 0, world = 1, local_rank = -1;      // local_rank -1: to be found out
    std::string master;                            // tcp: where rank 0 listens
    int port = 29500;
};

inline int env_number(const char* name, int otherwise) {
    const char* text = std::getenv(name);
    if (!text || !*text) return otherwise;
    char* end = nullptr;
    const long value = std::strtol(text, &end, 10);
    if (*end || value < 0 || value > 1000000) fail("the environment has %s=%s: a whole number is needed", name, text);
    return (int)value;
}

inline Launch detect_launch() {
    const auto has = [](const char* name) { const char* text = std::getenv(name); return text && *text; };
    Launch launch;
    const bool by_mpi = has("OMPI_COMM_WORLD_SIZE") || has("PMIX_RANK") || has("PMI_RANK");
    const bool by_srun = has("SLURM_STEP_ID") && env_number("SLURM_STEP_NUM_TASKS", 1) > 1;
    if (has("RANK") && has("WORLD_SIZE")) {
        launch.how = Launch::tcp;
        launch.rank = env_number("RANK", 0);
        launch.world = env_number("WORLD_SIZE", 1);
        launch.local_rank = env_number("LOCAL_RANK", -1);
    } else if (by_mpi) {
        launch.how = Launch::mpi;
#ifndef SAMBA_MPI
        fail("this process was launched by mpirun, and this program was built without MPI: install libopenmpi-dev and build again, "
             "or set RANK, WORLD_SIZE and MASTER_ADDR");
#endif
        return launch;
    } else if (by_srun) {
        launch.how = Launch::tcp;
        launch.rank = env_number("SLURM_PROCID", 0);
        launch.world = env_number("SLURM_STEP_NUM_TASKS", 1);
        launch.local_rank = env_number("SLURM_LOCALID", -1);
    }
    if (launch.world == 1) launch.how = Launch::single;
    if (launch.how == Launch::single) return launch;
    if (launch.rank >= launch.world) fail("the environment has RANK=%d with WORLD_SIZE=%d: ranks count from 0", launch.rank, launch.world);
    if (!has("MASTER_ADDR")) fail("the environment has %d ranks and no MASTER_ADDR: set it to the host name or address of rank 0", launch.world);
    launch.master = std::getenv("MASTER_ADDR");
    launch.port = env_number("MASTER_PORT", launch.port);
    const char* taken = std::getenv("TORCHELASTIC_USE_AGENT_STORE");
    if (has("RANK") && taken && strcasecmp(taken, "true") == 0) launch.port++;     // torchrun's store, for programs that use it, is there
    return launch;
}

inline std::string host_name() {
    char name[256] = "";
    gethostname(name, sizeof name - 1);
    return name;
}

// ---------------------------------------------------------------------------------------------------------------------
// Sockets

class Socket {
    int fd_ = -1;

public:
    Socket() = default;
    explicit Socket(int fd) : fd_(fd) {}
    Socket(Socket&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
    Socket& operator=(Socket&& other) noexcept { std::swap(fd_, other.fd_); return *this; }
    ~Socket() { if (fd_ >= 0) ::close(fd_); }
    int fd() const { return fd_; }
    bool open() const { return fd_ >= 0; }
    void close() { *this = Socket(); }

    // Whole messages; false where the other end is gone
    bool send_all(const void* data, size_t bytes) const {
        const char* p = (const char*)data;
        while (bytes > 0) {
            const ssize_t n = ::send(fd_, p, bytes, MSG_NOSIGNAL);
            if (n < 0 && errno == EINTR) continue;
            if (n <= 0) return false;
            p += n;
            bytes -= (size_t)n;
        }
        return true;
    }
    bool recv_all(void* data, size_t bytes) const {
        char* p = (char*)data;
        while (bytes > 0) {
            const ssize_t n = ::recv(fd_, p, bytes, 0);
            if (n < 0 && errno == EINTR) continue;
            if (n <= 0) return false;
            p += n;
            bytes -= (size_t)n;
        }
        return true;
    }
    bool send_text(const std::string& text) const {
        const uint32_t length = (uint32_t)text.size();
        return send_all(&length, 4) && send_all(text.data(), length);
    }
    bool recv_text(std::string& text) const {
        uint32_t length = 0;
        if (!recv_all(&length, 4) || length > (64 << 20)) return false;
        text.resize(length);
        return recv_all(text.data(), length);
    }
    void timeout(int seconds) const {              // of a single read; 0: none
        const timeval t{seconds, 0};
        setsockopt(fd_, SOL_SOCKET, SO_RCVTIMEO, &t, sizeof t);
    }
    void no_delay() const {
        const int on = 1;
        setsockopt(fd_, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    }
};

inline Socket listen_on(int port /*0: any*/) {
    Socket s(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
    const int on = 1;
    setsockopt(s.fd(), SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons((uint16_t)port);
    if (bind(s.fd(), (sockaddr*)&address, sizeof address) != 0 || listen(s.fd(), 4096) != 0)
        fail("rank 0 cannot listen on port %d: %s; set MASTER_PORT to a free one", port, strerror(errno));
    return s;
}
inline int port_of(const Socket& s) {
    sockaddr_in address{};
    socklen_t length = sizeof address;
    getsockname(s.fd(), (sockaddr*)&address, &length);
    return ntohs(address.sin_port);
}
inline Socket accept_on(const Socket& listener) {
    for (;;) {
        Socket s(accept4(listener.fd(), nullptr, nullptr, SOCK_CLOEXEC));
        if (s.open()) { s.no_delay(); return s; }
        if (errno != EINTR && errno != ECONNABORTED) fail("cannot accept a connection: %s", strerror(errno));
    }
}

// A connection, or a closed socket after `milliseconds`
inline Socket connect_to(const std::string& host, int port, int milliseconds) {
    addrinfo hints{}, *found = nullptr;
    hints.ai_family = AF_INET;
    hints.ai_socktype = SOCK_STREAM;
    if (getaddrinfo(host.c_str(), std::to_string(port).c_str(), &hints, &found) != 0 || !found) return {};
    Socket s(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
    bool connected = connect(s.fd(), found->ai_addr, found->ai_addrlen) == 0;
    if (!connected && errno == EINPROGRESS) {
        pollfd wait{s.fd(), POLLOUT, 0};
        int error = 0;
        socklen_t length = sizeof error;
        connected = poll(&wait, 1, milliseconds) == 1 && getsockopt(s.fd(), SOL_SOCKET, SO_ERROR, &error, &length) == 0 && error == 0;
    }
    freeaddrinfo(found);
    if (!connected) return {};
    fcntl(s.fd(), F_SETFL, fcntl(s.fd(), F_GETFL) & ~O_NONBLOCK);
    s.no_delay();
    return s;
}

// This machine's addresses, the ones that others can reach first
inline std::vector<std::string> own_addresses() {
    std::vector<std::string> addresses;
    ifaddrs* list = nullptr;
    if (getifaddrs(&list) == 0) {
        for (ifaddrs* i = list; i; i = i->ifa_next) {
            if (!i->ifa_addr || i->ifa_addr->sa_family != AF_INET || !(i->ifa_flags & IFF_UP) || (i->ifa_flags & IFF_LOOPBACK)) continue;
            char text[INET_ADDRSTRLEN];
            addresses.push_back(inet_ntop(AF_INET, &((sockaddr_in*)i->ifa_addr)->sin_addr, text, sizeof text));
        }
        freeifaddrs(list);
    }
    addresses.push_back("127.0.0.1");
    return addresses;
}

// The one who calls says who he is and whom he wants, the one who answers says whether that is him: two machines may both
// have a 127.0.0.1.
struct Greeting {
    uint64_t job = 0;                              // random, drawn by rank 0; 0: not known yet
    int32_t from = 0, to = 0, world = 0;
    enum Purpose : int32_t { control, data } purpose = control;
};

inline Socket greet(const std::vector<std::string>& addresses, int port, Greeting greeting, double seconds) {
    const auto until = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
    do {
        for (const std::string& address : addresses) {
            Socket s = connect_to(address, port, 2000);
            int32_t answer = 0;
            if (!s.open()) continue;
            s.timeout(10);
            if (s.send_all(&greeting, sizeof greeting) && s.recv_all(&answer, sizeof answer) && answer == 1) {
                s.timeout(0);
                return s;
            }
            if (answer == 2)
                fail("rank %d was started with a world of %d ranks and rank 0 with another number: set the same WORLD_SIZE everywhere",
                     greeting.from, greeting.world);
        }
        std::this_thread::sleep_for(std::chrono::milliseconds(50));
    } while (std::chrono::steady_clock::now() < until);
    return {};
}

// Accepts `count` connections of this purpose into by_rank[their rank]. Strangers are turned away.
inline void accept_ranks(const Socket& listener, std::vector<Socket>& by_rank, int count, Greeting self, double seconds) {
    const auto until = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
    while (count > 0) {
        pollfd wait{listener.fd(), POLLIN, 0};
        const int left = (int)std::chrono::duration_cast<std::chrono::milliseconds>(until - std::chrono::steady_clock::now()).count();
        if (left <= 0 || poll(&wait, 1, left) == 0) {
            std::string missing;
            for (int r = 0; r < self.world; r++)
                if (r != self.from && !by_rank[r].open() && (self.purpose == Greeting::control || r > self.from)) missing += " " + std::to_string(r);
            fail("rank %d waited %.0f s for ranks%s, which did not connect: are they started, and is their MASTER_ADDR right?",
                 self.from, seconds, missing.c_str());
        }
        Socket s = accept_on(listener);
        Greeting g;
        s.timeout(5);
        if (!s.recv_all(&g, sizeof g)) continue;
        const bool mine = g.to == self.from && g.purpose == self.purpose && (g.job == 0 || g.job == self.job) && g.from >= 0;
        const int32_t answer = !mine ? 0 : g.world != self.world || g.from >= self.world ? 2 : by_rank[g.from].open() ? 0 : 1;
        if (!s.send_all(&answer, sizeof answer) || answer != 1) continue;
        s.timeout(0);
        by_rank[g.from] = std::move(s);
        count--;
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Bytes between two ranks

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
