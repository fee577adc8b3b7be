/* Preloaded into a process: what it does to files below one folder is counted, and from a chosen event on goes wrong.

   An event is a write, the creation of a file or folder, fsync, a new name (rename, link), or a removal, below the
   folder; or an allocation of PyTorch's, or a look at the clock. `inject` chooses; until then everything is passed on. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum kind { WRITE = 1, CREATE = 2, SYNC = 4, RENAME = 8, REMOVE = 16, MEMORY = 32, CLOCK = 64 };
enum fault { NOTHING, KILLED, SIGNALLED, REFUSED, SHORT, BACK };

#define A_DAY (24 * 60 * 60)
#define SMALL 1024 /* bytes of an allocation that is left alone */

static char folder[PATH_MAX];
static int fault, kinds, detail;
static long first, last, seen;

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

/* folder: absolute, "" for nowhere. kinds: of events that count. detail: a signal's number, or an errno.
   first, last: numbers, from 0, of the events that go wrong; after a short write the rest is as it is asked for. */
void inject(const char *where, int what, int which, int with, long from, long to) {
  strncpy(folder, where, sizeof folder - 1);
  fault = what, kinds = which, detail = with, first = from, last = to, seen = 0;
}

long events(void) { return seen; }

static int below(const char *path) {
  size_t length = strlen(folder);
  char whole[2 * PATH_MAX], here[PATH_MAX];
  if (!length || !path) return 0;
  if (path[0] != '/') {
    if (!getcwd(here, sizeof here)) return 0;
    snprintf(whole, sizeof whole, "%s/%s", here, path);
    path = whole;
  }
  return !strncmp(path, folder, length) && (path[length] == '/' || !path[length]);
}

static int open_below(int file) {
  char link[64], path[PATH_MAX];
  if (!folder[0] || file < 3) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", file);
  ssize_t length = readlink(link, path, sizeof path - 1);
  if (length < 0) return 0;
  path[length] = 0;
  return below(path);
}

/* Whether this event goes wrong; a signal has been sent then. */
static int wrong(enum kind kind) {
  if (!(kinds & kind)) return 0;
  long number = __atomic_fetch_add(&seen, 1, __ATOMIC_SEQ_CST);
  if (number < first || number > last || fault == NOTHING) return 0;
  if (fault == KILLED) kill(getpid(), SIGKILL);
  if (fault == SIGNALLED) {
    kill(getpid(), detail);
    return 0;
  }
  if (fault == REFUSED) errno = detail;
  return 1;
}

static int creating(int flags, const char *path) {
  return (flags & (O_WRONLY | O_RDWR | O_CREAT)) && below(path) && wrong(CREATE);
}

#define OPEN(name)                                                                                                     \
  int name(const char *path, int flags, ...) {                                                                         \
    va_list more;                                                                                                      \
    va_start(more, flags);                                                                                             \
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0;                                            \
    va_end(more);                                                                                                      \
    return creating(flags, path) && fault == REFUSED ? -1 : REAL(name)(path, flags, mode);                             \
  }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                                                                   \
  int name(int at, const char *path, int flags, ...) {                                                                 \
    va_list more;                                                                                                      \
    va_start(more, flags);                                                                                             \
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0;                                            \
    va_end(more);                                                                                                      \
    return creating(flags, path) && fault == REFUSED ? -1 : REAL(name)(at, path, flags, mode);                         \
  }
OPENAT(openat)
OPENAT(openat64)

FILE *fopen(const char *path, const char *mode) {
  int writes = mode[0] != 'r' || strchr(mode, '+');
  return creating(writes ? O_WRONLY : 0, path) && fault == REFUSED ? NULL : REAL(fopen)(path, mode);
}
FILE *fopen64(const char *path, const char *mode) {
  int writes = mode[0] != 'r' || strchr(mode, '+');
  return creating(writes ? O_WRONLY : 0, path) && fault == REFUSED ? NULL : REAL(fopen64)(path, mode);
}

ssize_t write(int file, const void *data, size_t size) {
  int saved = errno;
  if (open_below(file) && wrong(WRITE)) {
    if (fault == REFUSED) return -1;
    if (fault == SHORT && size > 1) size = size / 2;
  } else {
    errno = saved;
  }
  return REAL(write)(file, data, size);
}
ssize_t pwrite64(int file, const void *data, size_t size, off64_t at) {
  if (open_below(file) && wrong(WRITE)) {
    if (fault == REFUSED) return -1;
    if (fault == SHORT && size > 1) size = size / 2;
  }
  return REAL(pwrite64)(file, data, size, at);
}
ssize_t writev(int file, const struct iovec *parts, int count) {
  if (open_below(file) && wrong(WRITE)) {
    if (fault == REFUSED) return -1;
    if (fault == SHORT) return write(file, parts[0].iov_base, parts[0].iov_len);
  }
  return REAL(writev)(file, parts, count);
}
ssize_t sendfile64(int to, int from, off64_t *at, size_t size) {
  if (open_below(to) && wrong(WRITE) && fault == REFUSED) return -1;
  ssize_t (*real)(int, int, off64_t *, size_t) = dlsym(RTLD_NEXT, "sendfile64");
  return real(to, from, at, size);
}
int fsync(int file) { return open_below(file) && wrong(SYNC) && fault == REFUSED ? -1 : REAL(fsync)(file); }
int fdatasync(int file) { return open_below(file) && wrong(SYNC) && fault == REFUSED ? -1 : REAL(fdatasync)(file); }
int mkdir(const char *path, mode_t mode) {
  return below(path) && wrong(CREATE) && fault == REFUSED ? -1 : REAL(mkdir)(path, mode);
}
int rename(const char *from, const char *to) {
  return below(to) && wrong(RENAME) && fault == REFUSED ? -1 : REAL(rename)(from, to);
}
int renameat(int at, const char *from, int into, const char *to) {
  return below(to) && wrong(RENAME) && fault == REFUSED ? -1 : REAL(renameat)(at, from, into, to);
}
int link(const char *from, const char *to) {
  return below(to) && wrong(RENAME) && fault == REFUSED ? -1 : REAL(link)(from, to);
}
int unlink(const char *path) {
  return below(path) && wrong(REMOVE) && fault == REFUSED ? -1 : REAL(unlink)(path);
}
int unlinkat(int at, const char *path, int flags) {
  return folder[0] && wrong(REMOVE) && fault == REFUSED ? -1 : REAL(unlinkat)(at, path, flags);
}
int rmdir(const char *path) { return below(path) && wrong(REMOVE) && fault == REFUSED ? -1 : REAL(rmdir)(path); }
int posix_memalign(void **memory, size_t alignment, size_t size) {
  if (folder[0] && size >= SMALL && wrong(MEMORY) && fault == REFUSED) return ENOMEM;
  return REAL(posix_memalign)(memory, alignment, size);
}
int clock_gettime(clockid_t clock, struct timespec *now) {
  int status = REAL(clock_gettime)(clock, now);
  if (folder[0] && clock == CLOCK_REALTIME && wrong(CLOCK) && fault == BACK) now->tv_sec -= A_DAY;
  return status;
}
