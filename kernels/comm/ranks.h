// The processes of a run: which one we are, signs of life to the others, and small messages between all of them, through host memory.
// A single process needs none of it: every function then returns at once.
#pragma once
#include "guard.h"
#include "rendezvous.h"

struct Ranks {
    int rank = 0, world = 1, local_rank = 0;
    std::vector<std::string> hosts;                // of every rank

    bool main() const { return rank == 0; }
    const char* host_transport() const { return transport_ ? transport_->name() : "none"; }

    // -- launch ---------------------------------------------------------------------------------------------------------

    void start() { start(detect_launch()); }
    void start(const Launch& launch) {
        std::vector<Socket> control;
        hosts = {host_name()};
        if (launch.how == Launch::mpi) start_mpi();
        if (launch.how == Launch::tcp) {
            rank = launch.rank, world = launch.world;
            transport_ = meet_over_tcp(launch, hosts[0], control);
        }
        if (world == 1) return;
        if (launch.how == Launch::mpi) control = connect_control(rank, world, hosts[0], [&](const std::string& text) { return broadcast(text); });
        hosts = all_texts(hosts[0]);
        local_rank = 0;
        for (int r = 0; r < rank; r++) local_rank += hosts[r] == hosts[rank];
        const bool first_of_host = local_rank == 0;
        if (launch.local_rank >= 0) local_rank = launch.local_rank;
        guard_ = std::make_unique<Guard>(rank, hosts, first_of_host, std::move(control));
    }

    // This rank cannot go on: ends the job on all ranks with the reason. Returns (the exit status) only in a single process.
    int give_up(const std::string& reason) {
        if (guard_) guard_->give_up(reason);
        fprintf(stderr, "error: %s\n", reason.c_str());
        if (world > 1) _exit(1);
        return 1;
    }

    // -- signs of life --------------------------------------------------------------------------------------------------

    void tick() const {
        if (!guard_) return;
        if (++guard_->progress >= hang_at_ && guard_->state == Guard::busy) pause();
    }
    // From here on a rank without progress counts as hung. files: what moves while it reads and writes them.
    void watch(double timeout, const std::atomic<uint64_t>& files) {
        if (!guard_) return;
        guard_->timeout = timeout;
        guard_->progress_of_files = &files;
        const char* who = std::getenv("SAMBA_TEST_HANG");                          // for tests: alive, and stuck
        if (who && atoi(who) == rank) hang_at_ = guard_->progress + 100;
        guard_->watching = true;
    }
    // While one of these lives, the rank is busy with `doing` in this way
    class During {
        Guard* guard;
        int32_t state_before = 0;
        const char* doing_before = nullptr;
    public:
        During(const Ranks& ranks, Guard::State state, const char* doing) : guard(ranks.guard_.get()) {
            if (!guard) return;
            doing_before = guard->doing.exchange(doing);
            state_before = guard->state.exchange(state);
            guard->progress++;
        }
        ~During() {
            if (!guard) return;
            guard->doing = doing_before;
            guard->state = state_before;
            guard->progress++;
        }
        During(const During&) = delete;
        During& operator=(const During&) = delete;
    };

    // -- messages -------------------------------------------------------------------------------------------------------

    // Sends to one rank and receives from another at the same time. A rank of -1: only the other half.
    void exchange(int to, const void* out, int64_t out_bytes, int from, void* in, int64_t in_bytes) const {
        transport_->exchange(to, out, out_bytes, from, in, in_bytes);
    }

    void wait_for_all(const char* doing) const {
        if (world == 1) return;
        const During during(*this, Guard::waiting, doing);
        char out = 0, in = 0;
        for (int k = 1; k < world; k *= 2) exchange((rank + k) % world, &out, 1, (rank - k + world) % world, &in, 1);
    }

    std::string broadcast(const std::string& text /*of rank 0*/) const {
        if (world == 1) return text;
        const During during(*this, Guard::waiting, "waiting for rank 0");
        std::string result = text;
        int64_t length = (int64_t)text.size();
        // A tree: each rank hears it from the one that has all but its highest bit
        int above = 1;
        while (above <= rank) above *= 2;
        if (rank > 0) {
            const int parent = rank - above / 2;
            exchange(-1, nullptr, 0, parent, &length, sizeof length);
            result.resize((size_t)length);
            exchange(-1, nullptr, 0, parent, result.data(), length);
        }
        for (int k = above; rank + k < world; k *= 2) {
            exchange(rank + k, &length, sizeof length, -1, nullptr, 0);
            exchange(rank + k, result.data(), length, -1, nullptr, 0);
        }
        return result;
    }

    // Row r is what rank r gave: doubles, the same number everywhere
    std::vector<std::vector<double>> all_rows(const std::vector<double>& row) const {
        std::vector<std::vector<double>> rows(world, row);
        const During during(*this, Guard::waiting, "exchanging numbers");
        for (int s = 1; s < world; s++) {
            const int to = (rank + s) % world, from = (rank - s + world) % world;
            const int64_t bytes = (int64_t)(row.size() * sizeof(double));
            exchange(to, row.data(), bytes, from, rows[from].data(), bytes);
        }
        return rows;
    }

    std::vector<std::string> all_texts(const std::string& text) const {
        std::vector<std::string> texts(world, text);
        const During during(*this, Guard::waiting, "telling each other");
        int64_t out = (int64_t)text.size();
        for (int s = 1; s < world; s++) {
            const int to = (rank + s) % world, from = (rank - s + world) % world;
            int64_t in = 0;
            exchange(to, &out, sizeof out, from, &in, sizeof in);
            texts[from].resize((size_t)in);
            exchange(to, text.data(), out, from, texts[from].data(), in);
        }
        return texts;
    }

    struct Item { std::string name, value, advice; };

    // Ends the job where the ranks do not all have the same items, naming the first that differs and the rank
    void agree(const std::vector<Item>& items) const {
        if (world == 1) return;
        std::string mine;
        for (const Item& item : items) mine += item.name + '\0' + item.value + '\0';
        const std::vector<std::string> texts = all_texts(mine);
        for (int r = 1; r < world; r++) {
            if (texts[r] == texts[0]) continue;
            if (rank == 0) disagree(items, r, texts[r]);
            std::this_thread::sleep_for(std::chrono::seconds(30));                 // rank 0 says so and ends the job
        }
    }

protected:
    std::unique_ptr<Guard> guard_;

    // A rank that does not come here is missed, and ends the job
    void leave() {
        if (guard_) guard_->finish();
        guard_.reset();
#ifdef SAMBA_MPI
        if (mpi_) MPI_Finalize();
#endif
        world = 1;
    }

private:
    std::unique_ptr<Transport> transport_;
    bool mpi_ = false;
    uint64_t hang_at_ = UINT64_MAX;

    void start_mpi() {
#ifdef SAMBA_MPI
        int provided = 0;
        MPI_Init_thread(nullptr, nullptr, MPI_THREAD_FUNNELED, &provided);
        mpi_ = true;
        MPI_Comm_rank(MPI_COMM_WORLD, &rank);
        MPI_Comm_size(MPI_COMM_WORLD, &world);
        transport_ = std::make_unique<MpiTransport>();
        if (const int tasks = env_number("SLURM_STEP_NUM_TASKS", world); world == 1 && tasks > 1 && !std::getenv("OMPI_COMM_WORLD_SIZE"))
            fail("srun started %d tasks and MPI sees one: use srun --mpi=pmix, or set RANK, WORLD_SIZE and MASTER_ADDR as scripts/slurm.sbatch does",
                 tasks);
        if (world == 1) MPI_Finalize();
#endif
    }

    [[noreturn]] void disagree(const std::vector<Item>& items, int r, const std::string& text) const {
        size_t at = 0;
        const auto next = [&] {
            const size_t end = std::min(text.find('\0', at), text.size());
            const std::string word = text.substr(std::min(at, text.size()), end - at);
            at = end + 1;
            return word;
        };
        for (const Item& item : items) {
            const std::string name = next(), value = next();
            if (name != item.name || value != item.value)
                fail("rank %d on %s has another %s than rank 0 on %s: %.300s, not %.300s; %s", r, hosts[r].c_str(), item.name.c_str(),
                     hosts[0].c_str(), value.c_str(), item.value.c_str(), item.advice.c_str());
        }
        fail("rank %d on %s was started with more options than rank 0", r, hosts[r].c_str());
    }
};
