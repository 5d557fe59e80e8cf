/* Injects disk faults by LD_PRELOAD: calls that fail, are delayed, or kill the process.

   FAULT="CALL PATH FIRST COUNT ACTION" selects calls of CALL (write, fsync or rename) on files whose
   path contains PATH: COUNT of them, starting with number FIRST. ACTION is an errno to fail with,
   `sleepN` for a delay of N milliseconds, `kill` for SIGKILL instead of the call, `half` for SIGKILL
   after half the bytes are written, or `after` for SIGKILL after the call. Read again at every call.

   TRACE="FOLDER" reports every call that changes anything in FOLDER (or flushes it) before it
   happens, as a line of call, path and second path in the FIFO FOLDER.requests, and waits for a byte
   in FOLDER.replies. A write is done in two halves, with a report before each. Calls are serialized.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#define REAL(name) dlsym(RTLD_NEXT, name)

static atomic_int seen;

/* Whether this call gets a fault, and which action. */
static int has_fault(const char *call, const char *path, char *action) {
  char wanted_call[16], wanted_path[256];
  int first, count;
  const char *fault = getenv("FAULT");
  if (!fault || sscanf(fault, "%15s %255s %d %d %15s", wanted_call, wanted_path, &first, &count,
                       action) != 5)
    return 0;
  if (strcmp(call, wanted_call) || !strstr(path, wanted_path)) return 0;
  int number = ++seen;
  return number >= first && number < first + count;
}

static void path_of(int descriptor, char *path, size_t size) {
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  ssize_t length = readlink(link, path, size - 1);
  path[length > 0 ? length : 0] = 0;
}

static void die(void) {
  kill(getpid(), SIGKILL);
  for (;;) pause();
}

/* Act before the call. Returns 1 if it must fail, with errno set. */
static int before(const char *action) {
  if (!strcmp(action, "kill")) die();
  if (!strncmp(action, "sleep", 5)) usleep(1000 * atoi(action + 5));
  else if ((errno = atoi(action))) return 1;
  return 0;
}

static pthread_mutex_t one_at_a_time = PTHREAD_MUTEX_INITIALIZER;

static int is_traced(const char *path) {
  const char *root = getenv("TRACE");
  size_t length = root ? strlen(root) : 0;
  return length && !strncmp(path, root, length) && (!path[length] || path[length] == '/');
}

static void report(const char *call, const char *path, const char *other) {
  static int requests = -1, replies = -1;
  char line[9000];
  if (requests < 0) {
    snprintf(line, sizeof line, "%s.requests", getenv("TRACE"));
    requests = syscall(SYS_openat, AT_FDCWD, line, O_WRONLY | O_CLOEXEC);
    snprintf(line, sizeof line, "%s.replies", getenv("TRACE"));
    replies = syscall(SYS_openat, AT_FDCWD, line, O_RDONLY | O_CLOEXEC);
  }
  int length = snprintf(line, sizeof line, "%s\t%s\t%s\n", call, path, other);
  if (syscall(SYS_write, requests, line, length) != length || read(replies, line, 1) != 1) abort();
}

/* Start a call. Returns 1 if it is traced; then `end` must be called. */
static int begin(const char *call, const char *path, const char *other) {
  if (!is_traced(path)) return 0;
  pthread_mutex_lock(&one_at_a_time);
  report(call, path, other);
  return 1;
}

static void end(int traced) {
  int number = errno;
  if (traced) pthread_mutex_unlock(&one_at_a_time);
  errno = number;
}

static void path_at(int folder, const char *name, char *path, size_t size) {
  path[0] = 0;
  if (name[0] != '/' && folder != AT_FDCWD) {
    path_of(folder, path, size);
    strncat(path, "/", size - strlen(path) - 1);
  }
  strncat(path, name, size - strlen(path) - 1);
}

ssize_t write(int descriptor, const void *bytes, size_t size) {
  ssize_t (*real)(int, const void *, size_t) = REAL("write");
  char path[4096], action[16] = "";
  path_of(descriptor, path, sizeof path);
  if (begin("write", path, "")) {
    ssize_t half = size / 2, first = half ? real(descriptor, bytes, half) : 0, rest = 0;
    if (first == half) {
      if (half) report("half", path, "");
      rest = real(descriptor, (const char *)bytes + half, size - half);
    }
    end(1);
    return rest < 0 && !first ? rest : first + (rest > 0 ? rest : 0);
  }
  int hit = has_fault("write", path, action);
  if (hit) {
    if (!strcmp(action, "half")) {
      real(descriptor, bytes, size / 2);
      die();
    }
    if (before(action)) return -1;
  }
  ssize_t written = real(descriptor, bytes, size);
  if (hit && !strcmp(action, "after")) die();
  return written;
}

int fsync(int descriptor) {
  int (*real)(int) = REAL("fsync");
  char path[4096], action[16] = "";
  path_of(descriptor, path, sizeof path);
  int hit = has_fault("fsync", path, action);
  if (hit && before(action)) return -1;
  int traced = begin("fsync", path, ""), result = real(descriptor);
  end(traced);
  if (hit && !strcmp(action, "after")) die();
  return result;
}

int rename(const char *from, const char *to) {
  int (*real)(const char *, const char *) = REAL("rename");
  char action[16] = "";
  int hit = has_fault("rename", to, action);
  if (hit && before(action)) return -1;
  int traced = begin("rename", from, to), result = real(from, to);
  end(traced);
  if (hit && !strcmp(action, "after")) die();
  return result;
}

/* The following calls are only traced. */

static int open_at(int folder, const char *name, int flags, int mode) {
  char path[4096];
  path_at(folder, name, path, sizeof path);
  int traced = flags & (O_CREAT | O_TRUNC) && begin(flags & O_TRUNC ? "truncate" : "create", path, "");
  int result = syscall(SYS_openat, folder, name, flags, mode);
  end(traced);
  return result;
}

#define MODE(flags, mode)                                               \
  va_list rest;                                                         \
  va_start(rest, flags);                                                \
  int mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(rest, int) : 0;   \
  va_end(rest);

int open(const char *path, int flags, ...) {
  MODE(flags, mode)
  return open_at(AT_FDCWD, path, flags, mode);
}

int open64(const char *path, int flags, ...) {
  MODE(flags, mode)
  return open_at(AT_FDCWD, path, flags | O_LARGEFILE, mode);
}

int openat(int folder, const char *path, int flags, ...) {
  MODE(flags, mode)
  return open_at(folder, path, flags, mode);
}

int openat64(int folder, const char *path, int flags, ...) {
  MODE(flags, mode)
  return open_at(folder, path, flags | O_LARGEFILE, mode);
}

ssize_t pwrite64(int descriptor, const void *bytes, size_t size, off64_t at) {
  ssize_t (*real)(int, const void *, size_t, off64_t) = REAL("pwrite64");
  char path[4096];
  path_of(descriptor, path, sizeof path);
  int traced = begin("write", path, "");
  ssize_t result = real(descriptor, bytes, size, at);
  end(traced);
  return result;
}

int ftruncate64(int descriptor, off64_t size) {
  int (*real)(int, off64_t) = REAL("ftruncate64");
  char path[4096];
  path_of(descriptor, path, sizeof path);
  int traced = begin("truncate", path, ""), result = real(descriptor, size);
  end(traced);
  return result;
}

int mkdir(const char *path, mode_t mode) {
  int (*real)(const char *, mode_t) = REAL("mkdir");
  int traced = begin("mkdir", path, ""), result = real(path, mode);
  end(traced);
  return result;
}

int rmdir(const char *path) {
  int (*real)(const char *) = REAL("rmdir");
  int traced = begin("rmdir", path, ""), result = real(path);
  end(traced);
  return result;
}

int unlink(const char *path) {
  int (*real)(const char *) = REAL("unlink");
  int traced = begin("unlink", path, ""), result = real(path);
  end(traced);
  return result;
}

int unlinkat(int folder, const char *name, int flags) {
  int (*real)(int, const char *, int) = REAL("unlinkat");
  char path[4096];
  path_at(folder, name, path, sizeof path);
  int traced = begin(flags & AT_REMOVEDIR ? "rmdir" : "unlink", path, "");
  int result = real(folder, name, flags);
  end(traced);
  return result;
}
