// Ends the job on every rank when one of them dies, hangs or gives up, and says which and why.
//
// A thread of each rank keeps a TCP connection to rank 0 and sends a sign of life every second: how often it came forward so
// far, and whether it is busy or waits for others. Rank 0 knows all of them:
//   a connection that closes                              that rank died
//   no sign of life for --rank-timeout seconds            it is stopped, or its machine is gone
//   alive, busy, and not a step forward for as long       it hangs, in its computing or in its files
//   all ranks wait and none comes forward for as long     the network hangs
//   a rank that gives up says why
// A step forward is a layer, a bucket, or a piece of a file (data/files.h): on a slow disk a checkpoint may take as long as it takes.
// Rank 0 prints the reason, passes it on to all, and everybody leaves. Ranks that lose rank 0 do the same by themselves. The
// threads hold no lock that the training needs and read nothing but atomics, so they work while everything else is stuck.
#pragma once
#include <atomic>
#include <functional>
#include <mutex>

#include "sockets.h"

class Guard {
public:
    enum State : int32_t { busy, waiting };

    std::atomic<uint64_t> progress{0};
    std::atomic<const std::atomic<uint64_t>*> progress_of_files{nullptr};          // counts as well
    std::atomic<int32_t> state{busy};
    std::atomic<const char*> doing{"starting"};
    std::atomic<double> timeout{45};
    std::atomic<bool> watching{false};             // before that only silence counts

    // sockets: on rank 0 one for each other rank, elsewhere the one to rank 0 at [0]. check: an error of the GPU's library, or ""
    Guard(int rank, std::vector<std::string> hosts, bool first_of_host, std::vector<Socket> sockets)
        : rank_(rank), world_((int)hosts.size()), first_of_host_(first_of_host), hosts_(std::move(hosts)), sockets_(std::move(sockets)) {
        peers_.resize(world_);
        peers_[rank_].done = true;
        if (rank_ != 0)
            for (int r = 1; r < world_; r++) peers_[r].done = true;               // rank 0 looks after those
        thread_ = std::thread([this] { run(); });
    }
    void set_check(std::function<std::string()> check) {
        std::lock_guard<std::mutex> lock(check_mutex_);
        check_ = std::move(check);
    }

    // The regular end, after a barrier: rank 0 waits until all have taken leave.
    void finish() {
        leaving_ = true;
        thread_.join();
    }

    // This rank gives up: the job ends everywhere. Does not return.
    [[noreturn]] void give_up(const std::string& reason) {
        {
            std::lock_guard<std::mutex> lock(check_mutex_);
            reason_ = reason;
        }
        giving_up_ = true;
        std::this_thread::sleep_for(std::chrono::seconds(10));                     // the thread ends the process
        end("rank " + std::to_string(rank_) + " on " + hosts_[rank_] + ": " + reason, true);
    }

private:
    enum Kind : int32_t { beat, failed, bye };
    struct Message {
        Kind kind = beat;
        int32_t state = 0;
        uint64_t progress = 0;
        char doing[48] = "";
        char text[1024] = "";
    };
    struct Peer {
        double seen = 0, moved = 0;                // on clock_
        Message last;
        bool done = false;                         // has taken leave, or is not ours to watch
    };

    void run() {
        double sent = -1;
        auto now = std::chrono::steady_clock::now();
        for (;;) {
            const bool quiet = !receive();
            const auto next = std::chrono::steady_clock::now();
            clock_ += std::min(1.0, std::chrono::duration<double>(next - now).count());      // while it was stopped itself it saw nobody
            now = next;
            if (giving_up_) {
                std::string reason;
                {
                    std::lock_guard<std::mutex> lock(check_mutex_);
                    reason = reason_;
                }
                if (rank_ == 0) end(name(0) + reason, true);
                Message m = own(failed);
                snprintf(m.text, sizeof m.text, "%s", reason.c_str());
                if (!sockets_[0].send_all(&m, sizeof m)) end(name(rank_) + reason, true);
                sockets_[0].timeout(5);
                for (Message answer; sockets_[0].recv_all(&answer, sizeof answer) && answer.kind != failed;) {}
                end(name(rank_) + reason, first_of_host_);
            }
            // What another rank says may follow from what this one is about to say: a second for that
            if (!heard_.empty() && clock_ > heard_at_ + 1) end(heard_, true);
            if (clock_ - sent >= 1) {
                send_beats();
                sent = clock_;
            }
            if (leaving_ && take_leave()) return;
            if (quiet) look_around();
        }
    }

    Message own(Kind kind) const {
        Message m;
        m.kind = kind;
        m.state = state;
        m.progress = progress;
        if (const std::atomic<uint64_t>* files = progress_of_files) m.progress += *files;
        snprintf(m.doing, sizeof m.doing, "%s", doing.load());
        return m;
    }
    std::string name(int r) const { return "rank " + std::to_string(r) + " on " + hosts_[r] + ": "; }

    void send_beats() {
        const Message m = own(beat);
        for (const Socket& s : sockets_)
            if (s.open()) ::send(s.fd(), &m, sizeof m, MSG_NOSIGNAL | MSG_DONTWAIT);         // a full buffer: that rank does not listen
        std::string trouble;
        {
            std::lock_guard<std::mutex> lock(check_mutex_);
            if (check_) trouble = check_();
            if (!trouble.empty() && !giving_up_) reason_ = trouble;
        }
        if (!trouble.empty()) giving_up_ = true;
    }

    // True when something came in. Waits a quarter of a second for it.
    bool receive() {
        std::vector<pollfd> wait;
        std::vector<int> whose;
        for (int r = 0; r < (int)sockets_.size(); r++)
            if (sockets_[r].open() && !(rank_ == 0 && r == 0)) {
                wait.push_back({sockets_[r].fd(), POLLIN, 0});
                whose.push_back(r);
            }
        if (poll(wait.data(), wait.size(), 250) <= 0) return false;
        bool any = false;
        for (size_t k = 0; k < wait.size(); k++) {
            if (!wait[k].revents) continue;
            Message m;
            Peer& peer = peers_[whose[k]];
            any = true;
            if (!sockets_[whose[k]].recv_all(&m, sizeof m)) {
                sockets_[whose[k]].close();
                const char* died = "it died (its connection closed); look for its own last words, or for a signal in the system's log";
                if (!peer.done && !(leaving_ && rank_ != 0)) end(name(whose[k]) + died, true);
                peer.done = true;
                continue;
            }
            if (m.kind == failed && rank_ != 0) end(m.text, first_of_host_);
            if (m.kind == failed && heard_.empty()) {
                heard_ = name(whose[k]) + m.text;
                heard_at_ = clock_;
            }
            if (m.kind == bye) peer.done = true;
            if (m.progress != peer.last.progress || m.state != peer.last.state) peer.moved = clock_;
            peer.seen = clock_;
            peer.last = m;
        }
        return any;
    }

    void look_around() {
        Peer& self = peers_[rank_];
        const Message mine = own(beat);
        if (mine.progress != self.last.progress || mine.state != self.last.state) self.moved = clock_;
        self.last = mine;
        if (timeout <= 0) return;
        double all_wait = clock_;
        char text[160];
        for (int r = 0; r < world_; r++) {
            const Peer& p = peers_[r];
            const double still = clock_ - p.moved;
            if (p.done && r != rank_) continue;
            snprintf(text, sizeof text, "no sign of life for %.0f s: it is stopped, or its machine or network is down", clock_ - p.seen);
            if (r != rank_ && clock_ - p.seen > timeout) end(name(r) + text, true);
            if (rank_ != 0 || !watching) continue;
            snprintf(text, sizeof text, "it hangs: %.0f s without progress while %s (--rank-timeout sets the limit)", still, p.last.doing);
            if (p.last.state != waiting && still > timeout) end(name(r) + text, true);
            all_wait = std::min(all_wait, p.last.state == waiting ? still : 0.0);
        }
        const char* all = "all ranks have been waiting for each other for %.0f s while %s: the network or its library hangs";
        snprintf(text, sizeof text, all, all_wait, self.last.doing);
        if (rank_ == 0 && watching && all_wait > timeout) end(text, true);
    }

    // True when this rank may go
    bool take_leave() {
        if (rank_ != 0) {
            const Message m = own(bye);
            sockets_[0].send_all(&m, sizeof m);
            return true;
        }
        for (const Peer& p : peers_)
            if (!p.done) return false;
        return true;
    }

    // The job is over. _exit: destructors would wait for work that will never finish. Others hear of it before the screen does,
    // where a program that stopped reading would hold us up.
    [[noreturn]] void end(const std::string& reason, bool print) {
        if (rank_ == 0) {
            Message m = own(failed);
            snprintf(m.text, sizeof m.text, "%s", reason.c_str());
            for (const Socket& s : sockets_)
                if (s.open()) ::send(s.fd(), &m, sizeof m, MSG_NOSIGNAL | MSG_DONTWAIT);
        }
        const std::string line = "error: " + reason + "\n";
        pollfd screen{STDERR_FILENO, POLLOUT, 0};
        if (print && poll(&screen, 1, 1000) == 1 && ::write(STDERR_FILENO, line.data(), line.size()) < 0) {}
        if (rank_ == 0) std::this_thread::sleep_for(std::chrono::milliseconds(300));         // before a launcher kills the others
        _exit(1);
    }

    int rank_, world_;
    bool first_of_host_;
    std::vector<std::string> hosts_;
    std::vector<Socket> sockets_;
    std::vector<Peer> peers_;
    double clock_ = 0, heard_at_ = 0;
    std::string heard_;                            // the first reason to give up that came from another rank
    std::atomic<bool> leaving_{false}, giving_up_{false};
    std::mutex check_mutex_;
    std::function<std::string()> check_;
    std::string reason_;
    std::thread thread_;
};
