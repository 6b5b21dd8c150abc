/* Loaded before a process's own libraries (LD_PRELOAD): counts the calls that change files below one folder, whoever makes them,
   and at a chosen one ends the process as a crash would, fails as a bad disk would, or sends the process a signal.

   A call is one of open (that creates or truncates), write, fsync, truncate, rename, unlink, mkdir, rmdir, chmod, flock. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { COUNT, KILL_BEFORE, KILL_AFTER, TEAR, FAIL, FILL, SIGNAL };

static char below[PATH_MAX];
static size_t below_length;
static int action, error_number /* or the signal's */, log_file = -1;
static long chosen;
static atomic_long seen;
static atomic_int full;

#define REAL(name) static typeof(name)* real; if (!real) real = (typeof(name)*)dlsym(RTLD_NEXT, #name)

static ssize_t really_write(int file, const void* data, size_t size) {
    REAL(write);
    return real(file, data, size);
}

/* From now on calls below `folder` are counted from 1; at call `call` comes `what`. Each is told to `log` unless that is -1. */
void fault_arm(const char* folder, long call, int what, int error, int log) {
    strncpy(below, folder, sizeof below - 1);
    below_length = strlen(below);
    chosen = call, action = what, error_number = error, log_file = log;
    atomic_store(&seen, 0);
    atomic_store(&full, 0);
}

static int is_below(const char* path) {
    return below_length && path && !strncmp(path, below, below_length) && (path[below_length] == '/' || !path[below_length]);
}

static int descriptor_is_below(int file, char* path) {
    char link[64];
    if (!below_length || file == log_file) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    path[length < 0 ? 0 : length] = 0;
    return length > 0 && is_below(path);
}

static void die(void) {
    kill(getpid(), SIGKILL);
    for (;;) pause();
}

/* What is to come of this call: COUNT where it goes on as ever. */
static int next(const char* kind, const char* path, int needs_room) {
    int before = errno;
    long number = atomic_fetch_add(&seen, 1) + 1;
    if (log_file >= 0) {
        char line[PATH_MAX + 32];
        int length = snprintf(line, sizeof line, "%s %s\n", kind, path);
        if (really_write(log_file, line, length) < 0) abort();
    }
    errno = before;
    if (number == chosen && action == KILL_BEFORE) die();
    if (number == chosen && action == FILL) {
        atomic_store(&full, 1);
        return needs_room ? FILL : COUNT;
    }
    if (atomic_load(&full) && needs_room) {
        errno = error_number;
        return FAIL;
    }
    if (number != chosen) return COUNT;
    if (action == SIGNAL) {
        kill(getpid(), error_number);
        return COUNT;
    }
    if (action == FAIL) errno = error_number;
    return action;
}

/* The call itself between what comes before it and what comes after it. */
#define AROUND(kind, path, needs_room, call)               \
    int todo = next(kind, path, needs_room);               \
    if (todo == FAIL) return -1;                           \
    if (todo == FILL) { errno = error_number; return -1; } \
    int result = call;                                     \
    if (todo == KILL_AFTER || todo == TEAR) die();         \
    return result

ssize_t write(int file, const void* data, size_t size) {
    char path[PATH_MAX];
    if (!descriptor_is_below(file, path)) return really_write(file, data, size);
    int todo = next("write", path, 1);
    if (todo == FAIL) return -1;
    if (todo == TEAR || todo == FILL) {
        size_t half = size / 2;
        ssize_t written = half ? really_write(file, data, half) : 0;
        if (todo == TEAR) die();
        if (written > 0) return written;
        errno = error_number;
        return -1;
    }
    ssize_t written = really_write(file, data, size);
    if (todo == KILL_AFTER) die();
    return written;
}

ssize_t writev(int file, const struct iovec* parts, int count) {
    char path[PATH_MAX];
    REAL(writev);
    if (!descriptor_is_below(file, path)) return real(file, parts, count);
    int todo = next("write", path, 1);
    if (todo == FAIL) return -1;
    if (todo == FILL) { errno = error_number; return -1; }
    ssize_t written = real(file, parts, count);
    if (todo == KILL_AFTER || todo == TEAR) die();
    return written;
}

static int creates(int flags) { return flags & (O_CREAT | O_TRUNC); }

#define OPEN(name)                                                 \
    int name(const char* path, int flags, ...) {                   \
        va_list more;                                              \
        va_start(more, flags);                                     \
        mode_t mode = va_arg(more, mode_t);                        \
        va_end(more);                                              \
        REAL(name);                                                \
        if (!creates(flags) || !is_below(path)) return real(path, flags, mode); \
        AROUND("open", path, 1, real(path, flags, mode));          \
    }
#define OPENAT(name)                                               \
    int name(int folder, const char* path, int flags, ...) {       \
        va_list more;                                              \
        va_start(more, flags);                                     \
        mode_t mode = va_arg(more, mode_t);                        \
        va_end(more);                                              \
        REAL(name);                                                \
        if (!creates(flags) || !is_below(path)) return real(folder, path, flags, mode); \
        AROUND("open", path, 1, real(folder, path, flags, mode));  \
    }
#define FOPEN(name)                                                \
    FILE* name(const char* path, const char* mode) {               \
        REAL(name);                                                \
        if (mode[0] == 'r' || !is_below(path)) return real(path, mode); \
        int todo = next("open", path, 1);                          \
        if (todo == FAIL) return NULL;                             \
        if (todo == FILL) { errno = error_number; return NULL; }   \
        FILE* file = real(path, mode);                             \
        if (todo == KILL_AFTER || todo == TEAR) die();             \
        return file;                                               \
    }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)
FOPEN(fopen)
FOPEN(fopen64)

#define ON_DESCRIPTOR(name, kind)                                  \
    int name(int file) {                                           \
        char path[PATH_MAX];                                       \
        REAL(name);                                                \
        if (!descriptor_is_below(file, path)) return real(file);   \
        AROUND(kind, path, 0, real(file));                         \
    }
ON_DESCRIPTOR(fsync, "fsync")
ON_DESCRIPTOR(fdatasync, "fsync")

#define ON_DESCRIPTOR_WITH(name, type, kind)                       \
    int name(int file, type value) {                               \
        char path[PATH_MAX];                                       \
        REAL(name);                                                \
        if (!descriptor_is_below(file, path)) return real(file, value); \
        AROUND(kind, path, 0, real(file, value));                  \
    }
ON_DESCRIPTOR_WITH(ftruncate, off_t, "truncate")
ON_DESCRIPTOR_WITH(ftruncate64, off64_t, "truncate")
ON_DESCRIPTOR_WITH(fchmod, mode_t, "chmod")
ON_DESCRIPTOR_WITH(flock, int, "flock")

#define ON_PATH(name, kind)                                        \
    int name(const char* path) {                                   \
        REAL(name);                                                \
        if (!is_below(path)) return real(path);                    \
        AROUND(kind, path, 0, real(path));                         \
    }
ON_PATH(unlink, "unlink")
ON_PATH(rmdir, "rmdir")

int mkdir(const char* path, mode_t mode) {
    REAL(mkdir);
    if (!is_below(path)) return real(path, mode);
    AROUND("mkdir", path, 1, real(path, mode));
}

int chmod(const char* path, mode_t mode) {
    REAL(chmod);
    if (!is_below(path)) return real(path, mode);
    AROUND("chmod", path, 0, real(path, mode));
}

int fchmodat(int folder, const char* path, mode_t mode, int flags) {
    REAL(fchmodat);
    if (!is_below(path)) return real(folder, path, mode, flags);
    AROUND("chmod", path, 0, real(folder, path, mode, flags));
}

int unlinkat(int folder, const char* path, int flags) {
    char whole[PATH_MAX], *name = whole;
    REAL(unlinkat);
    if (path[0] == '/') strncpy(whole, path, sizeof whole - 1);
    else if (!descriptor_is_below(folder, whole)) return real(folder, path, flags);
    if (!is_below(name)) return real(folder, path, flags);
    AROUND("unlink", name, 0, real(folder, path, flags));
}

int rename(const char* path, const char* target) {
    REAL(rename);
    if (!is_below(target)) return real(path, target);
    AROUND("rename", target, 0, real(path, target));
}

int renameat(int folder, const char* path, int other, const char* target) {
    REAL(renameat);
    if (!is_below(target)) return real(folder, path, other, target);
    AROUND("rename", target, 0, real(folder, path, other, target));
}
