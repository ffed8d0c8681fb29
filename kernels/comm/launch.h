// How this process was launched: alone, or as one of several, and how it finds the others.
//
//   launched by                                          ranks found through     bytes travel by
//   nothing (one process)                                -                       -
//   mpirun, srun --mpi=pmix                              MPI                     MPI
//   RANK, WORLD_SIZE, MASTER_ADDR (torchrun's names),    TCP to rank 0           TCP, one connection for each two ranks
//   or srun without MPI and MASTER_ADDR
//
// MPI is called only when the environment shows it, so that a single process needs none of its services.
#pragma once
#include <cstdlib>
#include <string>

#include <strings.h>
#include <unistd.h>

#include "../device.cuh"

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
