// TCP between processes: a socket that closes itself, whole messages, and how ranks find and recognise each other.
#pragma once
#include <algorithm>
#include <cerrno>
#include <chrono>
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
#include <sys/socket.h>
#include <unistd.h>

#include "../device.cuh"

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
