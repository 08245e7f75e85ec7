/* Memory of large results, and a pool of that which has been released.
 *
 * A new array of 33 MB costs more in page faults than the arithmetic that fills it, and a training
 * loop releases one for each that it asks for. So NumPy's memory handler is ours while a result is
 * made: the array owns its data as any other does, and whoever frees it, in whatever thread, gives it
 * back to bn_free, which keeps some mappings for the next results. Large ones that nobody takes at once
 * are offered to the kernel, should it need their pages before we do. Arrays outlive every module, so there is nothing
 * here that ends.
 *
 * A mapping is one page, of which BnBlock is the beginning, and then the data. They begin with a page,
 * behind NumPy's own, which lie 16 bytes into theirs: a row that is read lies ahead of what has just
 * been written, also to a CPU that compares the last 12 bits of addresses. At 64 bytes into a page
 * results took 3 to 12 % longer in cache, at 0 as long as anywhere (Intel, 2026-11). */
#ifndef BN_FAST_POOL_H
#define BN_FAST_POOL_H

#include <Python.h>
#include <numpy/ndarraytypes.h>
#include <string.h>

#define BN_SMALLEST ((size_t)128 << 10) /* what malloc may take from the system and give back at once */

/* AddressSanitizer follows malloc and free alone. */
#if defined(__SANITIZE_ADDRESS__)
#define BN_POOL 0
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define BN_POOL 0
#endif
#endif
#if !defined(BN_POOL) && (defined(__linux__) || defined(__APPLE__))
#define BN_POOL 1
#endif

#if BN_POOL
#include <pthread.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#define BN_HUGE_PAGE ((size_t)2 << 20)
#define BN_HUGE_FROM ((size_t)4 << 20) /* where NumPy asks for huge pages */
#define BN_WINDOW 128                  /* results that make "of late": so many to twice as many */
#define BN_STALE 32                    /* results after which what nobody took makes room */
#define BN_HELD 64                     /* mappings at most */
#define BN_OFFERED ((size_t)64 << 20)  /* from here on offered at once */

typedef struct {
    size_t bytes; /* of the data, whole pages */
    int touched;  /* not as it came from the system, of zeros, whose pages are yet to be made */
} BnBlock;

typedef struct {
    char *data;
    size_t since; /* how many results had been asked for when it was released */
    int offered;  /* to the kernel */
} BnHeld;

static struct {
    pthread_mutex_t lock;
    size_t limit;            /* bytes held at most, */
    int sparing;             /* and if this is set no more than the two largest results of late */
    size_t largest[4];       /* the two largest of this window of results, and of the one before */
    size_t n_asked;
    BnHeld held[BN_HELD + 1]; /* the latest last, and room for one before another goes */
    int n_held;
    size_t held_bytes;
} bn_pool = {.lock = PTHREAD_MUTEX_INITIALIZER};

static size_t bn_page = 4096;
static int bn_wants_huge = 1;

static inline BnBlock *bn_block(const void *data) { return (BnBlock *)((char *)data - bn_page); }
static inline size_t bn_bytes(const void *data) { return bn_block(data)->bytes; }

/* Whether nobody has touched it; now somebody does. */
static inline int bn_touch(void *data) {
    int touched = bn_block(data)->touched;
    bn_block(data)->touched = 1;
    return !touched;
}

/* ---------------------------------------------------------------- mappings */

/* New pages, NULL if there are none. Large ones begin at a huge page. */
static char *bn_map(size_t bytes) {
    size_t room = bytes + bn_page, spare = bytes >= BN_HUGE_FROM ? BN_HUGE_PAGE : 0, head;
    char *base;
    if (room < bytes || room + spare < room) return NULL;
    base = (char *)mmap(NULL, room + spare, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON, -1, 0);
    if (base == MAP_FAILED) return NULL;
    if (spare) {
        head = (size_t)-(uintptr_t)(base + bn_page) % BN_HUGE_PAGE;
        if (head) munmap(base, head);
        if (spare - head) munmap(base + head + room, spare - head);
        base += head;
#ifdef MADV_HUGEPAGE
        if (bn_wants_huge) madvise(base, room, MADV_HUGEPAGE);
#endif
    }
    ((BnBlock *)base)->bytes = bytes;
    return base + bn_page;
}

static void bn_unmap(char *data) { munmap((char *)bn_block(data), bn_bytes(data) + bn_page); }

/* Let the kernel take the huge pages whenever it needs some, of what nobody has taken for a while: a
 * loop that takes them again and again would pay for marking them and for unmarking what it writes.
 * (64, 7, 7, 512), features last, 6 MiB, two threads: 199 us and 332 with out=, fresh 273 and 434, so
 * 167 and 322; (32, 64, 56, 56), 25 MiB, 917 and 1095, so 895 and 904 (AMD EPYC, Zen 4, 2026-11-26).
 * Single pages, as smaller mappings have, are marked one by one: 10 us for 1 MiB, and as long again. */
static void bn_offer(BnHeld *held) {
    size_t bytes = bn_bytes(held->data);
    if (held->offered || bytes < BN_HUGE_FROM) return;
#ifdef MADV_FREE
    madvise(held->data, bytes / BN_HUGE_PAGE * BN_HUGE_PAGE, MADV_FREE);
#endif
    held->offered = 1;
}

/* ---------------------------------------------------------------- what is held; under the lock */

static char *bn_remove(int i) {
    char *data = bn_pool.held[i].data;
    bn_pool.held_bytes -= bn_bytes(data);
    bn_pool.n_held--;
    memmove(bn_pool.held + i, bn_pool.held + i + 1, (bn_pool.n_held - i) * sizeof(BnHeld));
    return data;
}

/* Put bytes into its place among the two largest. */
static void bn_rank(size_t *largest, size_t bytes) {
    if (bytes > largest[0]) largest[1] = largest[0], largest[0] = bytes;
    else if (bytes > largest[1]) largest[1] = bytes;
}

static void bn_note(size_t bytes) {
    if (bn_pool.n_asked++ % BN_WINDOW == 0) {
        memcpy(bn_pool.largest + 2, bn_pool.largest, 2 * sizeof(size_t));
        memset(bn_pool.largest, 0, 2 * sizeof(size_t));
    }
    bn_rank(bn_pool.largest, bytes);
}

static size_t bn_bound(void) {
    size_t two[2] = {bn_pool.largest[0], bn_pool.largest[1]};
    bn_rank(two, bn_pool.largest[2]);
    bn_rank(two, bn_pool.largest[3]);
    return bn_pool.sparing && two[0] + two[1] < bn_pool.limit ? two[0] + two[1] : bn_pool.limit;
}

/* Remove what nobody has wanted of late or is too large alone, and then until no more than the bound
 * is left: what has become stale, as after a change of sizes; else the smallest, for where all do not
 * fit, the oldest would be the next to be wanted. */
static int bn_trim(char **gone) {
    int n = 0, least;
    size_t bound = bn_bound();
    for (int i = bn_pool.n_held - 1; i >= 0; i--)
        if (bn_pool.n_asked - bn_pool.held[i].since > 2 * BN_WINDOW ||
            bn_bytes(bn_pool.held[i].data) > bound)
            gone[n++] = bn_remove(i);
    while (bn_pool.held_bytes > bound || bn_pool.n_held > BN_HELD) {
        least = 0; /* the oldest */
        for (int i = 1; i < bn_pool.n_held && bn_pool.n_asked - bn_pool.held[0].since <= BN_STALE; i++)
            if (bn_bytes(bn_pool.held[i].data) < bn_bytes(bn_pool.held[least].data)) least = i;
        gone[n++] = bn_remove(least);
    }
    return n;
}

/* ---------------------------------------------------------------- with the lock */

/* Unlock, and only then unmap: it takes the kernel as long as a call. */
static void bn_leave(char **gone, int n) {
    pthread_mutex_unlock(&bn_pool.lock);
    while (n) bn_unmap(gone[--n]);
}

/* A mapping that is as large as asked or up to an eighth larger, the one released last; or NULL. */
static char *bn_take(size_t bytes) {
    char *data = NULL, *gone[BN_HELD + 1];
    int n;
    pthread_mutex_lock(&bn_pool.lock);
    bn_note(bytes);
    for (int i = bn_pool.n_held - 1; i >= 0 && data == NULL; i--) {
        size_t had = bn_bytes(bn_pool.held[i].data);
        if (had >= bytes && had - bytes <= bytes / 8) data = bn_remove(i);
    }
    n = bn_trim(gone);
    for (int i = 0; i < bn_pool.n_held; i++)
        if (bn_pool.n_asked - bn_pool.held[i].since > BN_STALE) bn_offer(bn_pool.held + i);
    bn_leave(gone, n);
    return data;
}

static void bn_keep(char *data) {
    char *gone[BN_HELD + 1];
    BnHeld held = {data, 0, 0};
    bn_touch(data);
    if (bn_bytes(data) >= BN_OFFERED) bn_offer(&held);
    pthread_mutex_lock(&bn_pool.lock);
    held.since = bn_pool.n_asked;
    bn_pool.held[bn_pool.n_held++] = held;
    bn_pool.held_bytes += bn_bytes(data);
    bn_leave(gone, bn_trim(gone));
}

static void bn_drop_all(void) {
    char *gone[BN_HELD + 1];
    int n = 0;
    pthread_mutex_lock(&bn_pool.lock);
    while (bn_pool.n_held) gone[n++] = bn_remove(bn_pool.n_held - 1);
    bn_leave(gone, n);
}

static void bn_set_pool(size_t limit, int sparing) {
    char *gone[BN_HELD + 1];
    pthread_mutex_lock(&bn_pool.lock);
    __atomic_store_n(&bn_pool.limit, limit, __ATOMIC_RELAXED);
    bn_pool.sparing = sparing;
    memset(bn_pool.largest, 0, sizeof bn_pool.largest);
    bn_leave(gone, bn_trim(gone));
}

static size_t bn_pool_limit(void) { return __atomic_load_n(&bn_pool.limit, __ATOMIC_RELAXED); }

static size_t bn_pool_held(void) {
    size_t bytes;
    pthread_mutex_lock(&bn_pool.lock);
    bytes = bn_pool.held_bytes;
    pthread_mutex_unlock(&bn_pool.lock);
    return bytes;
}

/* ---------------------------------------------------------------- NumPy's handler */

static void *bn_malloc(void *ctx, size_t size) {
    size_t bytes = (size + bn_page - 1) / bn_page * bn_page;
    char *data;
    (void)ctx;
    if (bytes < size) return NULL;
    data = bn_take(bytes);
    if (data == NULL) data = bn_map(bytes);
    if (data == NULL) { /* what we hold may be what is missing */
        bn_drop_all();
        data = bn_map(bytes);
    }
    return data;
}

static void bn_free(void *ctx, void *data, size_t size) {
    (void)ctx; (void)size;
    if (data != NULL) bn_keep((char *)data);
}

static void *bn_calloc(void *ctx, size_t n, size_t size) {
    void *data;
    if (size && n > (size_t)-1 / size) return NULL;
    data = bn_malloc(ctx, n * size);
    if (data != NULL && !bn_touch(data)) memset(data, 0, n * size);
    return data;
}

static void *bn_realloc(void *ctx, void *old, size_t size) {
    void *data = bn_malloc(ctx, size);
    if (data == NULL || old == NULL) return data;
    bn_touch(data);
    memcpy(data, old, size < bn_bytes(old) ? size : bn_bytes(old));
    bn_free(ctx, old, 0);
    return data;
}

static PyDataMem_Handler bn_handler = {
    "bn_fast_results", 1, {NULL, bn_malloc, bn_calloc, bn_realloc, bn_free}
};

/* A child would copy each page that it, or its parent, writes to first: it begins with nothing. */
static void bn_before_fork(void) { pthread_mutex_lock(&bn_pool.lock); }
static void bn_in_parent(void) { pthread_mutex_unlock(&bn_pool.lock); }
static void bn_in_child(void) {
    while (bn_pool.n_held) bn_unmap(bn_remove(bn_pool.n_held - 1));
    pthread_mutex_unlock(&bn_pool.lock);
}

/* At import. */
static void bn_start_pool(void) {
    static int started = 0; /* a second module of it, as of a subinterpreter, has the same pool */
    const char *huge = getenv("NUMPY_MADVISE_HUGEPAGE");
    long page = sysconf(_SC_PAGESIZE);
    if (started++) return;
    if (page > 0) bn_page = (size_t)page;
    bn_wants_huge = huge == NULL || atoi(huge) != 0;
    pthread_atfork(bn_before_fork, bn_in_parent, bn_in_child);
}

/* Bytes of memory that the machine has and that this process may address. */
static double bn_usable_memory(void) {
    struct rlimit addresses;
    double bytes = (double)sysconf(_SC_PHYS_PAGES) * (double)bn_page;
    if (getrlimit(RLIMIT_AS, &addresses) == 0 && addresses.rlim_cur != RLIM_INFINITY &&
        (double)addresses.rlim_cur < bytes)
        bytes = (double)addresses.rlim_cur;
    return bytes > 0 ? bytes : 0;
}

#else
static PyDataMem_Handler bn_handler;
static inline void bn_start_pool(void) {}
static inline void bn_set_pool(size_t limit, int sparing) { (void)limit; (void)sparing; }
static inline size_t bn_pool_limit(void) { return 0; }
static inline size_t bn_pool_held(void) { return 0; }
static inline int bn_touch(void *data) { (void)data; return 0; }
static inline double bn_usable_memory(void) { return 0; }
#endif

#endif
