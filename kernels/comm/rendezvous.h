// How the processes of a run first meet, and what connects each two of them afterwards.
#pragma once
#include <iterator>
#include <memory>
#include <random>
#include <sstream>

#include "launch.h"
#include "transport.h"

inline uint64_t random_job() {
    std::random_device random;
    return ((uint64_t)random() << 20 ^ (uint64_t)getpid()) | 1;
}

// "PORT ADDRESS ADDRESS ...": where others reach a rank
struct Place {
    int port = 0;
    std::vector<std::string> addresses;
};
inline std::string own_place(int port) {
    std::string text = std::to_string(port);
    for (const std::string& address : own_addresses()) text += " " + address;
    return text;
}
inline Place read_place(const std::string& text) {
    std::istringstream in(text);
    Place place;
    in >> place.port;
    place.addresses = {std::istream_iterator<std::string>(in), {}};
    return place;
}

// For the guard: a connection of every rank to rank 0, which has those at [1 .. world-1]; the others have theirs at [0]. Where ranks already
// talk to each other: `broadcast` takes rank 0's text to all.
template <class Broadcast>
std::vector<Socket> connect_control(int rank, int world, const std::string& host, Broadcast broadcast) {
    const Socket listener = rank == 0 ? listen_on(0) : Socket();
    const std::string text = broadcast(std::to_string(random_job()) + " " + own_place(rank == 0 ? port_of(listener) : 0));
    const size_t space = text.find(' ');
    const Greeting g{std::stoull(text.substr(0, space)), rank, 0, world, Greeting::control};
    const Place first = read_place(text.substr(space));
    std::vector<Socket> control(rank == 0 ? world : 1);
    if (rank == 0) accept_ranks(listener, control, world - 1, g, 60);
    else if (control[0] = greet(first.addresses, first.port, g, 50); !control[0].open())
        fail("rank %d on %s cannot reach rank 0 on port %d at any of its addresses (%s): a firewall between them?",
             rank, host.c_str(), first.port, text.c_str());
    return control;
}

// Rank 0 hears from each rank where it listens and tells all of them all places. Returns "JOB\nPLACE\nPLACE\n...", in the order of ranks.
inline std::string exchange_places_as_first(const Socket& listener, const std::string& own, int world, std::vector<Socket>& control) {
    const uint64_t job = random_job();
    accept_ranks(listener, control, world - 1, {job, 0, 0, world, Greeting::control}, 60);
    std::string table = std::to_string(job) + "\n" + own + "\n";
    for (int r = 1; r < world; r++) {
        std::string place;
        control[r].timeout(60);
        if (!control[r].recv_text(place)) fail("rank %d closed its connection during the start, or said nothing for 60 s", r);
        control[r].timeout(0);
        table += place + "\n";
    }
    for (int r = 1; r < world; r++) control[r].send_text(table);
    return table;
}
inline std::string exchange_places(const Launch& launch, const std::string& own, std::vector<Socket>& control) {
    const int rank = launch.rank;
    std::string table;
    control[0] = greet({launch.master}, launch.port, {0, rank, 0, launch.world, Greeting::control}, 60);
    if (!control[0].open())
        fail("rank %d found no rank 0 at %s port %d in 60 s: is it started, and are MASTER_ADDR and MASTER_PORT right?",
             rank, launch.master.c_str(), launch.port);
    control[0].timeout(120);                       // rank 0 waits for all
    if (!control[0].send_text(own) || !control[0].recv_text(table))
        fail("rank 0 closed its connection to rank %d during the start, or said nothing for 120 s", rank);
    control[0].timeout(0);
    return table;
}

// Without MPI: all meet at rank 0, learn each other's places, and connect each two; the first connections stay, in `control`, for the guard.
inline std::unique_ptr<Transport> meet_over_tcp(const Launch& launch, const std::string& host, std::vector<Socket>& control) {
    const int rank = launch.rank, world = launch.world;
    auto tcp = std::make_unique<TcpTransport>();
    tcp->peers.resize(world);
    control.resize(rank == 0 ? world : 1);
    const Socket listener = listen_on(rank == 0 ? launch.port : 0);
    const std::string own = own_place(port_of(listener));
    std::istringstream lines(rank == 0 ? exchange_places_as_first(listener, own, world, control) : exchange_places(launch, own, control));
    std::string line;
    std::getline(lines, line);
    Greeting g{std::stoull(line), rank, 0, world, Greeting::data};
    for (int r = 0; r < rank; r++) {
        std::getline(lines, line);
        Place place = read_place(line);
        if (r == 0) place.addresses.insert(place.addresses.begin(), launch.master);
        g.to = r;
        tcp->peers[r] = greet(place.addresses, place.port, g, 50);
        if (!tcp->peers[r].open())
            fail("rank %d on %s cannot reach rank %d at any of its addresses (port %s): a firewall between them?",
                 rank, host.c_str(), r, line.c_str());
    }
    accept_ranks(listener, tcp->peers, world - 1 - rank, g, 60);
    return tcp;
}
