/* Makes a process's disk fail: a library to preload, which counts what is written below one directory, and lets one of
 * these operations fail, or kills the process there, half of a write being done.
 *
 *     cc -shared -fPIC -O1 -o failing_writes.so failing_writes.c -ldl
 *     LD_PRELOAD=./failing_writes.so FAILING_WRITES=control FAILING_WRITES_LOG=log python ...
 *
 * The whole process is covered, the Java machine's writes too, and processes that it starts: the control file is mapped
 * by all. Nothing is synced below the directory: what syncing is for cannot be seen without a power cut. Only what a C library writes by itself (fprintf, fwrite) passes unseen; with FAILING_WRITES_LOG each write is
 * logged with inode and length, so that it can be checked that no byte of a file came another way.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

struct control { /* scripts/failing_writes.py has the same layout */
    int64_t count;   /* operations so far */
    int64_t fail_at; /* the one that fails; 0 for none */
    int32_t error;   /* its errno; 0: the process is killed instead */
    int32_t stays;   /* whether all later ones fail too */
    char failed[256]; /* what failed first */
    char root[1024]; /* only what lies below; empty: nothing is counted */
};

static struct control *control;
static int log_file = -1;

__attribute__((constructor)) static void start(void) {
    const char *path = getenv("FAILING_WRITES"), *log = getenv("FAILING_WRITES_LOG");
    int file = path ? (int)syscall(SYS_openat, AT_FDCWD, path, O_RDWR | O_CLOEXEC, 0) : -1;
    if (file >= 0) {
        void *at = mmap(NULL, sizeof *control, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
        control = at == MAP_FAILED ? NULL : at;
        syscall(SYS_close, file);
    }
    if (log) log_file = (int)syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
}

/* The absolute name of a path, as far as it decides whether it lies below the root. */
static void full_path(int directory, const char *path, char *into, size_t size) {
    char link[64];
    ssize_t length = 0;
    into[0] = 0;
    if (path && path[0] == '/') {
        snprintf(into, size, "%s", path);
        return;
    }
    if (directory == AT_FDCWD) snprintf(link, sizeof link, "/proc/self/cwd");
    else snprintf(link, sizeof link, "/proc/self/fd/%d", directory);
    length = syscall(SYS_readlinkat, AT_FDCWD, link, into, size - 1);
    if (length < 0) length = 0;
    into[length] = 0;
    if (path) snprintf(into + length, size - length, "/%s", path);
}

/* Count an operation. 0: do it; 1: it fails, errno is set; 2: the process is to die; -1: it is none of ours. */
static int judge(const char *what, int directory, const char *path) {
    char name[4096];
    size_t root = control ? strlen(control->root) : 0;
    if (!root) return -1;
    int saved = errno;
    full_path(directory, path, name, sizeof name);
    errno = saved;
    if (strncmp(name, control->root, root) || (name[root] && name[root] != '/')) return -1;
    int64_t number = __atomic_add_fetch(&control->count, 1, __ATOMIC_SEQ_CST), at = control->fail_at;
    if (!at || number < at || (number > at && !control->stays)) return 0;
    if (number == at) snprintf(control->failed, sizeof control->failed, "%s %.200s", what, name + root);
    if (!control->error) return 2;
    errno = control->error;
    return 1;
}

static void die(void) {
    kill(getpid(), SIGKILL);
    for (;;) pause();
}

static int refused(const char *what, int directory, const char *path) {
    int verdict = judge(what, directory, path);
    if (verdict == 2) die();
    return verdict == 1;
}

static void note(int file, ssize_t length) {
    struct stat about;
    char line[64];
    int saved = errno;
    if (log_file >= 0 && length > 0 && !fstat(file, &about) && S_ISREG(about.st_mode)) {
        int used = snprintf(line, sizeof line, "%llu %lld\n", (unsigned long long)about.st_ino, (long long)length);
        syscall(SYS_write, log_file, line, used);
    }
    errno = saved;
}

#define REAL(name) \
    static __typeof__(name) *real; \
    if (!real) real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

/* --- bytes: half of them are written where the operation fails ----------------------------------------------------- */

ssize_t write(int file, const void *data, size_t length) {
    REAL(write);
    int verdict = judge("write", file, NULL);
    if (verdict > 0) {
        int error = errno;
        if (length > 1) real(file, data, length / 2);
        if (verdict == 2) die();
        errno = error;
        return -1;
    }
    ssize_t done = real(file, data, length);
    note(file, done);
    return done;
}

#define PWRITE(name) \
    ssize_t name(int file, const void *data, size_t length, off_t at) { \
        REAL(name); \
        int verdict = judge("pwrite", file, NULL); \
        if (verdict > 0) { \
            int error = errno; \
            if (length > 1) real(file, data, length / 2, at); \
            if (verdict == 2) die(); \
            errno = error; \
            return -1; \
        } \
        ssize_t done = real(file, data, length, at); \
        note(file, done); \
        return done; \
    }
PWRITE(pwrite)
PWRITE(pwrite64)

ssize_t writev(int file, const struct iovec *parts, int count) {
    REAL(writev);
    if (refused("writev", file, NULL)) return -1;
    ssize_t done = real(file, parts, count);
    note(file, done);
    return done;
}

ssize_t sendfile64(int file, int from, off_t *at, size_t length) {
    REAL(sendfile64);
    if (refused("sendfile", file, NULL)) return -1;
    ssize_t done = real(file, from, at, length);
    note(file, done);
    return done;
}

ssize_t copy_file_range(int from, off64_t *at, int file, off64_t *to, size_t length, unsigned flags) {
    REAL(copy_file_range);
    if (refused("copy_file_range", file, NULL)) return -1;
    ssize_t done = real(from, at, file, to, length, flags);
    note(file, done);
    return done;
}

/* --- files and directories ----------------------------------------------------------------------------------------- */

#define CREATES(flags) ((flags) & (O_CREAT | O_TRUNC))
#define MODE(flags) \
    mode_t mode = 0; \
    if ((flags) & (O_CREAT | O_TMPFILE)) { \
        va_list rest; \
        va_start(rest, flags); \
        mode = va_arg(rest, mode_t); \
        va_end(rest); \
    }

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        REAL(name); \
        MODE(flags) \
        if (CREATES(flags) && refused("open", AT_FDCWD, path)) return -1; \
        return real(path, flags, mode); \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name) \
    int name(int directory, const char *path, int flags, ...) { \
        REAL(name); \
        MODE(flags) \
        if (CREATES(flags) && refused("open", directory, path)) return -1; \
        return real(directory, path, flags, mode); \
    }
OPENAT(openat)
OPENAT(openat64)

#define ON_FILE(name, arguments, pass) \
    int name arguments { \
        REAL(name); \
        return refused(#name, file, NULL) ? -1 : real pass; \
    }
#define SYNC(name) \
    int name(int file) { \
        REAL(name); \
        int verdict = judge(#name, file, NULL); \
        if (verdict == 2) die(); \
        return verdict < 0 ? real(file) : -verdict; \
    }
SYNC(fsync)
SYNC(fdatasync)
ON_FILE(ftruncate, (int file, off_t length), (file, length))
ON_FILE(ftruncate64, (int file, off64_t length), (file, length))
ON_FILE(fallocate, (int file, int mode, off_t at, off_t length), (file, mode, at, length))

#define ON_PATH(name, directory, path, arguments, pass) \
    int name arguments { \
        REAL(name); \
        return refused(#name, directory, path) ? -1 : real pass; \
    }
ON_PATH(rename, AT_FDCWD, to, (const char *from, const char *to), (from, to))
ON_PATH(renameat, at, to, (int of, const char *from, int at, const char *to), (of, from, at, to))
ON_PATH(renameat2, at, to, (int of, const char *from, int at, const char *to, unsigned flags), (of, from, at, to, flags))
ON_PATH(link, AT_FDCWD, to, (const char *from, const char *to), (from, to))
ON_PATH(symlink, AT_FDCWD, to, (const char *from, const char *to), (from, to))
ON_PATH(mkdir, AT_FDCWD, path, (const char *path, mode_t mode), (path, mode))
ON_PATH(mkdirat, at, path, (int at, const char *path, mode_t mode), (at, path, mode))
ON_PATH(unlink, AT_FDCWD, path, (const char *path), (path))
ON_PATH(unlinkat, at, path, (int at, const char *path, int flags), (at, path, flags))
ON_PATH(rmdir, AT_FDCWD, path, (const char *path), (path))
