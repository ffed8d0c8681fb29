// Collectives between the processes of a run. A single process needs none of it: Comm then does nothing.
//
//   reduce(x, range)      sums x over ranks; the owner of each element gets the sum
//   all_gather(x, range)  every rank gets each element from its owner
//   gather(x, count)      x (world, count): every rank's row to all
//
// Element i of a flat array belongs to rank r where bounds[r] <= i < bounds[r+1]: contiguous shards, of any lengths.
// Between GPUs that is NCCL on a stream of its own, reduce as one ncclReduce for each owner in a group: a ring moves each element
// over each link once, as reduce-scatter would, and needs no equal parts. Where ranks share a GPU (NCCL refuses that) and in
// the CPU build the bytes go through host memory and MPI or TCP, and are added in the order of ranks.
// Cost of n fp32 elements on N ranks: reduce and all_gather each move 4 n (N-1)/N bytes into and out of every rank.
//
// After reduce_as_bf16() the sums travel as bf16, half the bytes, with an error of each contribution x of at most |x|/256:
//   host   what comes from others is rounded once, and added in fp32
//   NCCL   every contribution is rounded, and so is the sum on each of the N - 1 steps around the ring
//
// Two runs give the same bits: the host path adds rank 0, 1, 2, ...; for NCCL the ring algorithm is asked for, whose order
// depends on the machine's wiring alone (NCCL_ALGO in the environment wins).
#pragma once
#include <iterator>
#include <map>
#include <random>
#include <sstream>

#include "comm_guard.h"
#include "comm_host.h"
#include "ops.cuh"

#ifdef SAMBA_NCCL
#include <nccl.h>
#endif

// Shards of n elements: as equal as multiples of `alignment` allow
inline std::vector<int64_t> shard_bounds(int64_t n, int world, int64_t alignment) {
    std::vector<int64_t> bounds(world + 1);
    for (int r = 0; r <= world; r++) bounds[r] = std::min(n, round_up((int64_t)((__int128)n * r / world), alignment));
    return bounds;
}

struct Comm {
    int rank = 0, world = 1, local_rank = 0;
    std::vector<std::string> hosts;                // of every rank
    std::vector<std::string> devices;              // of every rank, after use_device()
    bool forced = false;                           // one process, and yet through the collectives: for tests

    Comm() = default;
    Comm(const Comm&) = delete;
    Comm& operator=(const Comm&) = delete;
    ~Comm() { if (world > 1) finish(); }

    bool active() const { return world > 1 || forced; }
    bool main() const { return rank == 0; }

    // -- launch ---------------------------------------------------------------------------------------------------------

    void start() { start(detect_launch()); }
    void start(const Launch& launch) {
        hosts = {host_name()};
        if (launch.how == Launch::mpi) start_mpi();
        if (launch.how == Launch::tcp) start_tcp(launch);
        if (world == 1) return;
        std::vector<Socket> control = launch.how == Launch::tcp ? std::move(control_) : connect_control();
        hosts = all_texts(hosts[0]);
        local_rank = 0;
        for (int r = 0; r < rank; r++) local_rank += hosts[r] == hosts[rank];
        const bool first_of_host = local_rank == 0;
        if (launch.local_rank >= 0) local_rank = launch.local_rank;
        guard_ = std::make_unique<Guard>(rank, hosts, first_of_host, std::move(control));
    }

    // Takes leave of the other ranks. A rank that does not come here is missed, and ends the job.
    void finish() {
        if (world == 1) return;
        if (guard_) {
            wait_for_all("the end");
            guard_->set_check({});
            stop_nccl();                           // still watched: it waits for the others
            guard_->finish();
            guard_.reset();
        }
        stop_nccl();
#ifdef SAMBA_MPI
        if (mpi_) MPI_Finalize();
#endif
        world = 1;
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
        During(const Comm& comm, Guard::State state, const char* doing) : guard(comm.guard_.get()) {
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

    // -- host side ------------------------------------------------------------------------------------------------------

    const char* host_transport() const { return transport_ ? transport_->name() : "none"; }

    void wait_for_all(const char* doing) const {
        if (world == 1) return;
        const During during(*this, Guard::waiting, doing);
        char out = 0, in = 0;
        for (int k = 1; k < world; k *= 2) transport_->exchange((rank + k) % world, &out, 1, (rank - k + world) % world, &in, 1);
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
            transport_->exchange(-1, nullptr, 0, parent, &length, sizeof length);
            result.resize((size_t)length);
            transport_->exchange(-1, nullptr, 0, parent, result.data(), length);
        }
        for (int k = above; rank + k < world; k *= 2) {
            transport_->exchange(rank + k, &length, sizeof length, -1, nullptr, 0);
            transport_->exchange(rank + k, result.data(), length, -1, nullptr, 0);
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
            transport_->exchange(to, row.data(), bytes, from, rows[from].data(), bytes);
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
            transport_->exchange(to, &out, sizeof out, from, &in, sizeof in);
            texts[from].resize((size_t)in);
            transport_->exchange(to, text.data(), out, from, texts[from].data(), in);
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

    // -- device side ----------------------------------------------------------------------------------------------------

    enum class Mode { automatic, nccl, host };

    // After this rank has chosen its GPU. Collectives are ordered after what was enqueued on `compute` when they are called.
    void use_device(Mode mode, Stream compute) {
        const std::string mine = device_identity();
        devices = world > 1 ? all_texts(mine) : std::vector<std::string>{mine};
        compute_ = stream_ = compute;
        if (mode == Mode::nccl && !ON_GPU) fail("--collectives nccl: this build is for the CPU, which has only host");
        std::map<std::string, int> owner;
        std::string shared;
        for (int r = 0; r < world && ON_GPU; r++) {
            const auto [first, fresh] = owner.emplace(hosts[r] + " " + devices[r], r);
            if (!fresh && shared.empty()) shared = "ranks " + std::to_string(first->second) + " and " + std::to_string(r) + " share a GPU";
        }
        if (mode == Mode::nccl && !shared.empty())
            fail("--collectives nccl: %s on %s, which NCCL refuses; start fewer ranks, or use --collectives host", shared.c_str(), hosts[0].c_str());
        forced = mode == Mode::nccl || forced;
        nccl_used_ = ON_GPU && mode != Mode::host && shared.empty() && active();
        note_ = !ON_GPU || mode == Mode::host || shared.empty() ? "" : shared + ", which NCCL refuses: gradients go through host memory";
        test_delay_ = env_number("SAMBA_TEST_DELAY", 0);
        if (const char* event = std::getenv("SAMBA_TEST_DROP")) test_drop_ = event;
        test_delay_compute_ = env_number("SAMBA_TEST_DELAY_COMPUTE", 0);
        if (nccl_used_) start_nccl();
        order_event_ = event_create();
        computed_ = event_create();
        if (!nccl_used_ && world > 1) staging_ = (float*)pinned_alloc((size_t)STAGING * (size_t)world * 2 * sizeof(float));
    }
    // From here on reduce() rounds to bf16. longest: elements of the largest range that will be reduced.
    void reduce_as_bf16(int64_t longest) {
        bf16_ = true;
        if (nccl_used_) rounded_ = (uint16_t*)device_alloc((size_t)longest * sizeof(uint16_t), "a bucket of gradients in bf16");
        else if (world > 1) rounded_ = (uint16_t*)pinned_alloc((size_t)STAGING * (size_t)world * 2 * sizeof(uint16_t));
    }
    bool as_bf16() const { return bf16_; }
    bool own_stream() const { return nccl_used_; }
    std::string describe() const {
        return (nccl_used_ ? "NCCL, in a ring" : std::string(host_transport()) + " through host memory") + (note_.empty() ? "" : " (" + note_ + ")");
    }

    // What the collectives do next comes after what `compute` has been given so far, and the other way round.
    // `what` is handed over; SAMBA_TEST_DROP=WHAT leaves that event out.
    void after_compute(const char* what) { order(stream_, compute_, what); }
    void before_compute(const char* what) { order(compute_, stream_, what); }
    void backward_done() { event_record(computed_, compute_); }
    void delay_compute() { if (test_delay_compute_) stream_delay(compute_, test_delay_compute_); }     // SAMBA_TEST_DELAY_COMPUTE=MICROSECONDS
    void mark(Event e) { event_record(e, stream_); }                               // after all collectives so far
    void wait(Event e) { if (own_stream() && test_drop_ != "new weights") stream_wait(compute_, e); }

    void reduce(float* x, Range range, const std::vector<int64_t>& bounds) {
        disturb(x + range.begin, range.size() * (int64_t)sizeof(float));
        if (nccl_used_) nccl_reduce(x, range, bounds);
        else if (world > 1) host_reduce(x, range, bounds);
        tick();
    }
    template <class T> void all_gather(T* x, Range range, const std::vector<int64_t>& bounds) {
        disturb(x + range.begin, range.size() * (int64_t)sizeof(T));
        if (nccl_used_) nccl_all_gather((char*)x, sizeof(T), range, bounds);
        else if (world > 1) host_all_gather((char*)x, sizeof(T), range, bounds);
        tick();
    }
    void gather(float* rows /*(world, count)*/, int64_t count) {
        if (nccl_used_) {
            disturb(rows, world * count * (int64_t)sizeof(float));
            nccl_gather(rows, count);
            return tick();
        }
        std::vector<int64_t> bounds(world + 1);
        for (int r = 0; r <= world; r++) bounds[r] = r * count;
        all_gather(rows, {0, world * count}, bounds);
    }

    // `bytes` to the next rank, and as many from the one before: what the link can do (dev/bench/bench_comm.cu)
    void shift(char* in, const char* out, int64_t bytes) {
        const int to = (rank + 1) % world, from = (rank - 1 + world) % world;
        if (nccl_used_) return nccl_shift(in, out, bytes, to, from);
        const int64_t piece = STAGING * (int64_t)sizeof(float);
        char *host_out = (char*)staging_, *host_in = host_out + world * piece;
        for (int64_t at = 0; at < bytes; at += piece) {
            const int64_t size = std::min(piece, bytes - at);
            copy_to_host(host_out, out + at, (size_t)size, stream_);
            stream_sync(stream_);
            transport_->exchange(to, host_out, size, from, host_in, size);
            copy_to_device(in + at, host_in, (size_t)size, stream_);
            stream_sync(stream_);
        }
    }

    // Waits for `compute`. The guard can tell from it who computes and who waits: first for what came before
    // backward_done(), then for the others' part.
    void synchronise() {
        event_sync(computed_);
        const During during(*this, Guard::waiting, "exchanging gradients");
        stream_sync(compute_);
    }

    // Part `range` of a sharded array to rank 0. `own` holds this rank's shard.
    void collect(float* out /*(range), host, on rank 0*/, const float* own, Range range, const std::vector<int64_t>& bounds) {
        const auto part_of = [&](int r) { return range & Range{bounds[r], bounds[r + 1]}; };
        const Range mine = part_of(rank);
        std::vector<float> copy(main() ? 0 : (size_t)mine.size());
        float* to = main() ? out + (mine.begin - range.begin) : copy.data();
        copy_to_host(to, own + (mine.begin - bounds[rank]), (size_t)mine.size() * sizeof(float), compute_);
        stream_sync(compute_);
        tick();
        const During during(*this, Guard::waiting, "collecting weights");
        if (!main()) return transport_->exchange(0, copy.data(), mine.size() * (int64_t)sizeof(float), -1, nullptr, 0);
        for (int r = 1; r < world; r++)
            if (const Range part = part_of(r); part.size() > 0)
                transport_->exchange(-1, nullptr, 0, r, out + (part.begin - range.begin), part.size() * (int64_t)sizeof(float));
    }

private:
    static constexpr int64_t STAGING = 1 << 20;    // floats on their way to or from each rank at a time

    // -- bootstrap

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

    // Every rank to rank 0, for the guard; over MPI rank 0 says where it listens
    std::vector<Socket> connect_control() {
        Socket listener = main() ? listen_on(0) : Socket();
        std::random_device random;
        std::string text = std::to_string(((uint64_t)random() << 20 ^ (uint64_t)getpid()) | 1) + " " + std::to_string(main() ? port_of(listener) : 0);
        for (const std::string& address : own_addresses()) text += " " + address;
        text = broadcast(text);
        std::istringstream in(text);
        Greeting g{0, rank, 0, world, Greeting::control};
        int port = 0;
        in >> g.job >> port;
        const std::vector<std::string> addresses{std::istream_iterator<std::string>(in), {}};
        std::vector<Socket> control(main() ? world : 1);
        if (main()) accept_ranks(listener, control, world - 1, g, 60);
        else if (control[0] = greet(addresses, port, g, 50); !control[0].open())
            fail("rank %d on %s cannot reach rank 0 on port %d at any of its addresses (%s): a firewall between them?",
                 rank, hosts[0].c_str(), port, text.c_str());
        return control;
    }

    // Without MPI: all meet at rank 0, learn each other's addresses, and connect each two
    void start_tcp(const Launch& launch) {
        rank = launch.rank;
        world = launch.world;
        auto tcp = std::make_unique<TcpTransport>();
        tcp->peers.resize(world);
        control_.resize(main() ? world : 1);
        Socket listener = listen_on(main() ? launch.port : 0);
        Greeting g{0, rank, 0, world, Greeting::control};
        std::string table, mine = std::to_string(port_of(listener));
        for (const std::string& address : own_addresses()) mine += " " + address;
        if (main()) {
            std::random_device random;
            g.job = ((uint64_t)random() << 20 ^ (uint64_t)getpid()) | 1;
            accept_ranks(listener, control_, world - 1, g, 60);
            std::vector<std::string> lines(world, mine);
            for (int r = 1; r < world; r++) {
                control_[r].timeout(60);
                if (!control_[r].recv_text(lines[r])) fail("rank %d closed its connection during the start, or said nothing for 60 s", r);
                control_[r].timeout(0);
            }
            table = std::to_string(g.job) + "\n";
            for (const std::string& line : lines) table += line + "\n";
            for (int r = 1; r < world; r++) control_[r].send_text(table);
        } else {
            control_[0] = greet({launch.master}, launch.port, g, 60);
            if (!control_[0].open())
                fail("rank %d found no rank 0 at %s port %d in 60 s: is it started, and are MASTER_ADDR and MASTER_PORT right?",
                     rank, launch.master.c_str(), launch.port);
            control_[0].timeout(120);              // rank 0 waits for all
            if (!control_[0].send_text(mine) || !control_[0].recv_text(table))
                fail("rank 0 closed its connection to rank %d during the start, or said nothing for 120 s", rank);
            control_[0].timeout(0);
        }
        std::istringstream lines(table);
        lines >> g.job;
        std::string line;
        std::getline(lines, line);
        g.purpose = Greeting::data;
        for (int r = 0; r < rank; r++) {
            std::getline(lines, line);
            std::istringstream words(line);
            int port = 0;
            words >> port;
            std::vector<std::string> addresses{std::istream_iterator<std::string>(words), {}};
            if (r == 0) addresses.insert(addresses.begin(), launch.master);
            g.to = r;
            tcp->peers[r] = greet(addresses, port, g, 50);
            if (!tcp->peers[r].open())
                fail("rank %d on %s cannot reach rank %d at any of its addresses (port %s): a firewall between them?",
                     rank, hosts[0].c_str(), r, line.c_str());
        }
        g.from = rank;
        accept_ranks(listener, tcp->peers, world - 1 - rank, g, 60);
        transport_ = std::move(tcp);
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

    // -- streams

    void order(Stream then, Stream first, const char* what) {
        event_record(order_event_, first);
        if (own_stream() && test_drop_ != what) stream_wait(then, order_event_);
    }

    // With SAMBA_TEST_DELAY=MICROSECONDS every collective first makes its data unreadable for so long, on its own stream.
    // A kernel that does not wait for it reads garbage, one that it does not wait for is undone: missing events show. The
    // latter with SAMBA_TEST_DELAY_COMPUTE, which makes the other stream come late.
    void disturb(void* data, int64_t bytes) {
        if (!test_delay_ || bytes <= 0) return;
        if (bytes > test_bytes_) {
            stream_sync(stream_);
            if (test_copy_) device_free(test_copy_);
            test_copy_ = device_alloc((size_t)bytes, "the copy of SAMBA_TEST_DELAY");
            test_bytes_ = bytes;
        }
        copy_on_device(test_copy_, data, (size_t)bytes, stream_);
        device_fill(data, 0xff, (size_t)bytes, stream_);
        stream_delay(stream_, test_delay_);
        copy_on_device(data, test_copy_, (size_t)bytes, stream_);
    }

    // -- through host memory

    // Walks the shards in pieces of the staging buffer: body(offset, length of each rank's piece there)
    template <class F> void pieces(Range range, const std::vector<int64_t>& bounds, int64_t piece, F body) {
        std::vector<Range> part(world);
        int64_t longest = 0;
        for (int r = 0; r < world; r++) {
            part[r] = range & Range{bounds[r], bounds[r + 1]};
            longest = std::max(longest, part[r].size());
        }
        std::vector<Range> now(world);
        for (int64_t at = 0; at < longest; at += piece) {
            for (int r = 0; r < world; r++) now[r] = part[r] & Range{part[r].begin + at, part[r].begin + at + piece};
            body(now);
        }
    }

    void host_reduce(float* x, Range range, const std::vector<int64_t>& bounds) {
        pieces(range, bounds, STAGING, [&](const std::vector<Range>& part) {
            float *out = staging_, *in = staging_ + world * STAGING;
            const int64_t n = part[rank].size();
            for (int r = 0; r < world; r++)
                copy_to_host((r == rank ? in : out) + r * STAGING, x + part[r].begin, (size_t)part[r].size() * sizeof(float), stream_);
            stream_sync(stream_);
            uint16_t *narrow_out = rounded_, *narrow_in = rounded_ + world * STAGING;
            for (int r = 0; r < world && bf16_; r++)
                if (r != rank) cpu::narrow(narrow_out + r * STAGING, out + r * STAGING, part[r].size());
            if (bf16_) exchange_parts(narrow_in, narrow_out, part);
            else exchange_parts(in, out, part);
            for (int r = 0; r < world && bf16_; r++)
                if (r != rank) cpu::widen(in + r * STAGING, narrow_in + r * STAGING, n);
            for (int r = 1; r < world; r++)        // in the order of ranks: the same bits every time
                for (int64_t i = 0; i < n; i++) in[i] += in[r * STAGING + i];
            copy_to_device(x + part[rank].begin, in, (size_t)n * sizeof(float), stream_);
            stream_sync(stream_);
        });
    }

    // Each rank's part of `out` to that rank, and everybody's piece of this rank's part into `in`, both (world, STAGING)
    template <class T> void exchange_parts(T* in, const T* out, const std::vector<Range>& part) {
        const During during(*this, Guard::waiting, "exchanging gradients");
        for (int s = 1; s < world; s++) {
            const int to = (rank + s) % world, from = (rank - s + world) % world;
            const auto bytes = [&](int r) { return part[r].size() * (int64_t)sizeof(T); };
            transport_->exchange(to, out + to * STAGING, bytes(to), from, in + from * STAGING, bytes(rank));
            tick();
        }
    }

    void host_all_gather(char* x, size_t size, Range range, const std::vector<int64_t>& bounds) {
        const int64_t piece = STAGING * (int64_t)sizeof(float) / (int64_t)size, stride = STAGING * (int64_t)sizeof(float);
        pieces(range, bounds, piece, [&](const std::vector<Range>& part) {
            char *out = (char*)staging_, *in = out + world * stride;
            const auto bytes = [&](int r) { return part[r].size() * (int64_t)size; };
            copy_to_host(out, x + part[rank].begin * (int64_t)size, (size_t)bytes(rank), stream_);
            stream_sync(stream_);
            const During during(*this, Guard::waiting, "exchanging weights");
            for (int s = 1; s < world; s++) {
                const int to = (rank + s) % world, from = (rank - s + world) % world;
                transport_->exchange(to, out, bytes(rank), from, in + from * stride, bytes(from));
                copy_to_device(x + part[from].begin * (int64_t)size, in + from * stride, (size_t)bytes(from), stream_);
                tick();
            }
            stream_sync(stream_);
        });
    }

    // -- NCCL

#ifdef SAMBA_NCCL
    static void nccl_check(ncclResult_t status, const char* call) {
        if (status == ncclSuccess || status == ncclInProgress) return;
        fail("NCCL: %s: %s (%s); NCCL_DEBUG=INFO tells more", call, ncclGetErrorString(status), ncclGetLastError(nullptr));
    }
    void start_nccl() {
        setenv("NCCL_ALGO", "Ring", 0);
        ncclUniqueId id{};
        if (main()) nccl_check(ncclGetUniqueId(&id), "ncclGetUniqueId");
        const std::string text = broadcast(std::string(id.internal, sizeof id.internal));
        memcpy(id.internal, text.data(), sizeof id.internal);
        {
            const During during(*this, Guard::waiting, "starting NCCL");
            nccl_check(ncclCommInitRank(&nccl_, world, id, rank), "ncclCommInitRank");
        }
        stream_ = stream_create();
        if (guard_) guard_->set_check([comm = nccl_] {
            ncclResult_t error = ncclSuccess;
            if (ncclCommGetAsyncError(comm, &error) != ncclSuccess || error == ncclSuccess || error == ncclInProgress) return std::string();
            return std::string("NCCL: ") + ncclGetErrorString(error) + " (" + ncclGetLastError(comm) + ")";
        });
    }
    void stop_nccl() {
        if (nccl_) ncclCommDestroy(nccl_);
        nccl_ = nullptr;
    }
    void nccl_reduce(float* x, Range range, const std::vector<int64_t>& bounds) {
        const auto at = [&](int64_t i) -> void* { return bf16_ ? (void*)(rounded_ + (i - range.begin)) : (void*)(x + i); };
        const ncclDataType_t type = bf16_ ? ncclBfloat16 : ncclFloat;
        if (bf16_) ops::narrow(rounded_, x + range.begin, range.size(), stream_);
        nccl_check(ncclGroupStart(), "ncclGroupStart");
        for (int r = 0; r < world; r++) {
            const Range part = range & Range{bounds[r], bounds[r + 1]};
            if (part.size() <= 0) continue;
            void* p = at(part.begin);
            nccl_check(ncclReduce(p, p, (size_t)part.size(), type, ncclSum, r, nccl_, stream_), "ncclReduce");
        }
        nccl_check(ncclGroupEnd(), "ncclGroupEnd");
        const Range mine = range & Range{bounds[rank], bounds[rank + 1]};
        if (bf16_) ops::widen(x + mine.begin, rounded_ + (mine.begin - range.begin), mine.size(), stream_);
    }
    void nccl_all_gather(char* x, size_t size, Range range, const std::vector<int64_t>& bounds) {
        nccl_check(ncclGroupStart(), "ncclGroupStart");
        for (int r = 0; r < world; r++) {
            const Range part = range & Range{bounds[r], bounds[r + 1]};
            char* p = x + part.begin * (int64_t)size;
            if (part.size() > 0) nccl_check(ncclBroadcast(p, p, (size_t)part.size() * size, ncclChar, r, nccl_, stream_), "ncclBroadcast");
        }
        nccl_check(ncclGroupEnd(), "ncclGroupEnd");
    }
    void nccl_gather(float* rows, int64_t count) {
        nccl_check(ncclAllGather(rows + rank * count, rows, (size_t)count, ncclFloat, nccl_, stream_), "ncclAllGather");
    }
    void nccl_shift(char* in, const char* out, int64_t bytes, int to, int from) {
        nccl_check(ncclGroupStart(), "ncclGroupStart");
        nccl_check(ncclSend(out, (size_t)bytes, ncclChar, to, nccl_, stream_), "ncclSend");
        nccl_check(ncclRecv(in, (size_t)bytes, ncclChar, from, nccl_, stream_), "ncclRecv");
        nccl_check(ncclGroupEnd(), "ncclGroupEnd");
    }
    ncclComm_t nccl_ = nullptr;
#else
    [[noreturn]] static void no_nccl() {
        fail("several GPUs need NCCL and this program was built without it: install libnccl-dev and build again, or use --collectives host");
    }
    void start_nccl() { no_nccl(); }
    void stop_nccl() {}
    void nccl_reduce(float*, Range, const std::vector<int64_t>&) { no_nccl(); }
    void nccl_all_gather(char*, size_t, Range, const std::vector<int64_t>&) { no_nccl(); }
    void nccl_gather(float*, int64_t) { no_nccl(); }
    void nccl_shift(char*, const char*, int64_t, int, int) { no_nccl(); }
#endif

    std::unique_ptr<Transport> transport_;
    std::unique_ptr<Guard> guard_;
    std::vector<Socket> control_;
    bool mpi_ = false, nccl_used_ = false;
    Stream compute_{}, stream_{};
    Event order_event_{}, computed_{};
    float* staging_ = nullptr;                     // host: (2, world, STAGING), to be sent and received
    uint16_t* rounded_ = nullptr;                  // bf16: the same on the host; between GPUs one range
    bool bf16_ = false;
    std::string note_;
    uint64_t hang_at_ = UINT64_MAX;
    int test_delay_ = 0, test_delay_compute_ = 0;
    std::string test_drop_;
    void* test_copy_ = nullptr;
    int64_t test_bytes_ = 0;
};
