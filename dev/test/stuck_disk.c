// A disk that is slow, or answers no more, for the tests: loaded by LD_PRELOAD, it stands before open(), write() and fsync().
//
//   DISK="hang write */.tmp_step_00000004*/*model*"    that call never comes back for files of such a path
//   DISK="slow write */.tmp_step_*"                    it takes half a second, and writes at most 16 KiB
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

// 1 where the disk is slow for this call and file; does not return where it hangs
static int delay(const char* call, const char* path) {
    const char* disk = getenv("DISK");
    char how[8], which[8], pattern[256];
    if (!disk || sscanf(disk, "%7s %7s %255s", how, which, pattern) != 3 || strcmp(call, which) || fnmatch(pattern, path, 0)) return 0;
    while (!strcmp(how, "hang")) pause();
    usleep(500000);
    return 1;
}
static int delay_fd(const char* call, int fd) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    const ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 0) return 0;
    path[n] = 0;
    return delay(call, path);
}

int open(const char* path, int flags, ...) {
    va_list more;
    va_start(more, flags);
    const mode_t mode = flags & O_CREAT ? va_arg(more, mode_t) : 0;
    va_end(more);
    delay("open", path);
    return ((int (*)(const char*, int, ...))dlsym(RTLD_NEXT, "open"))(path, flags, mode);
}
ssize_t write(int fd, const void* data, size_t bytes) {
    if (delay_fd("write", fd) && bytes > 16384) bytes = 16384;
    return ((ssize_t (*)(int, const void*, size_t))dlsym(RTLD_NEXT, "write"))(fd, data, bytes);
}
int fsync(int fd) {
    delay_fd("fsync", fd);
    return ((int (*)(int))dlsym(RTLD_NEXT, "fsync"))(fd);
}
