/* Plays callers, workers, listeners and a publisher for a broker that is measured, and says what the broker spent on it.

   One process, one thread, one epoll. The processor time of the broker is read from /proc/PID/task/TID/schedstat at
   both ends of the measured time, by this process itself, so that no start or end of anything is counted with it.

   generator --port N --dialect rpc|nats|wamp --mode ask|publish|idle|accept [options]; see `options` below.
   Prints one JSON object. Exit code 1 and a sentence on stderr if the broker does not do its part.

   cc -O2 -o generator generator.c                                     without TLS
   cc -O2 -DWITH_TLS -o generator generator.c -lssl -lcrypto           with it */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <netinet/tcp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>
#ifdef WITH_TLS
#include <openssl/ssl.h>
#endif

enum { HEAD = 512, READ = 1 << 18, ID_MAX = 160, PIDS_MAX = 64, STUCK_S = 60 };

/* ------------------------------------------------------------ what there is */

enum role { CALLER, WORKER, LISTENER, PUBLISHER };
enum kind { NOTHING, ASKED, ANSWERED, FAILED, HEARD, READY, PINGED };

struct message {
    enum kind kind;
    uint64_t number;    /* ANSWERED, FAILED: which of the caller's requests */
    char id[ID_MAX];    /* ASKED: what to answer to, as the broker wrote it; PINGED: what to send back */
    unsigned id_size;
};

struct peer {
    int fd;
    enum role role;
    unsigned index;
    char *out;          /* from out_sent to out_used: to be written */
    size_t out_size, out_used, out_sent;
    bool blocked;       /* the socket takes no more just now */
    char carried[HEAD]; /* the beginning of a message whose head is not whole yet */
    size_t carry;
    uint64_t skip;      /* bytes of the current message still to come */
    struct message got;
    uint64_t *sent_at;  /* CALLER: when each slot's request was sent, ns */
    struct message *held; /* WORKER that holds back: what it has been asked, a ring */
    unsigned held_first, held_count;
#ifdef WITH_TLS
    SSL *tls;
#endif
};

struct dialect {
    const char *name;
    void (*knock)(struct peer *);                        /* what opens a connection */
    void (*greet)(struct peer *);                        /* after it was opened: say hello, subscribe, serve */
    long (*head)(const char *, size_t, struct message *, uint64_t *); /* bytes of the head; 0: more is needed */
    void (*ask)(struct peer *, uint64_t number);
    void (*answer)(struct peer *, const struct message *);
    void (*publish)(struct peer *);
    void (*pong)(struct peer *, const struct message *);
};

static const struct dialect *dialect;
static struct {
    int port, pids[PIDS_MAX], pids_count;
    unsigned callers, flight, workers, listeners, idle, endpoints, hold;
    uint64_t bytes, reply_bytes, count;
    double warm_s, seconds;
    const char *mode, *token, *caller_path, *worker_path;
    bool tls;
} given = {.callers = 1, .flight = 1, .workers = 4, .listeners = 1, .idle = 1, .bytes = 128, .warm_s = 0.5,
           .seconds = 1.5, .mode = "ask", .token = "", .caller_path = "/ws/echo", .worker_path = "/ws/echo?role=worker"};

static struct peer *peers;
static unsigned peers_count;
static int poller;
static char *payload;
static uint64_t ready, asked, completed, heard, failed, published, bytes_read;
static char first_failure[HEAD];
static uint64_t histogram[64 * 64]; /* of latencies: 64 steps for each power of two */

static void fail(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fputc('\n', stderr);
    exit(1);
}

static uint64_t now_ns(void) {
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    return (uint64_t)at.tv_sec * 1000000000u + (uint64_t)at.tv_nsec;
}

/* ------------------------------------------------------------ the broker's processor time and memory */

static double broker_cpu_s(void) {
    double sum = 0;
    for (int i = 0; i < given.pids_count; i++) {
        char folder[64];
        snprintf(folder, sizeof folder, "/proc/%d/task", given.pids[i]);
        DIR *tasks = opendir(folder);
        for (struct dirent *task; tasks && (task = readdir(tasks));) {
            if (*task->d_name == '.') continue; /* ".." has a schedstat too: the first thread again */
            char path[400];
            unsigned long long ns;
            snprintf(path, sizeof path, "%s/%s/schedstat", folder, task->d_name);
            FILE *file = fopen(path, "r");
            if (!file) continue;
            if (fscanf(file, "%llu", &ns) == 1) sum += ns / 1e9;
            fclose(file);
        }
        if (tasks) closedir(tasks);
    }
    return sum;
}

static double broker_kib(void) {
    double sum = 0;
    for (int i = 0; i < given.pids_count; i++) {
        char path[64], line[256];
        double kib;
        snprintf(path, sizeof path, "/proc/%d/status", given.pids[i]);
        FILE *file = fopen(path, "r");
        while (file && fgets(line, sizeof line, file))
            if (sscanf(line, "VmRSS: %lf", &kib) == 1) sum += kib;
        if (file) fclose(file);
    }
    return sum;
}

static void note(uint64_t ns) {
    if (ns < 64) { histogram[ns]++; return; }
    int power = 63 - __builtin_clzll(ns);
    histogram[(power - 5) * 64 + ((ns >> (power - 6)) & 63)]++;
}

static double quantile_us(double part) {
    uint64_t all = 0, seen = 0;
    for (int i = 0; i < 64 * 64; i++) all += histogram[i];
    for (int i = 0; i < 64 * 64; i++)
        if (all && (seen += histogram[i]) > (uint64_t)(part * (double)all))
            return i < 64 ? i / 1e3 : (double)(1ull << (i / 64 + 5)) * (1 + (i % 64 + 0.5) / 64) / 1e3;
    return 0;
}

/* ------------------------------------------------------------ bytes in and out */

static ssize_t take(struct peer *peer, void *to, size_t size) {
#ifdef WITH_TLS
    if (peer->tls) {
        int got = SSL_read(peer->tls, to, size > INT32_MAX ? INT32_MAX : (int)size);
        if (got > 0) return got;
        errno = SSL_get_error(peer->tls, got) == SSL_ERROR_WANT_READ ? EAGAIN : ECONNRESET;
        return -1;
    }
#endif
    return recv(peer->fd, to, size, 0);
}

static ssize_t give(struct peer *peer, const void *from, size_t size) {
#ifdef WITH_TLS
    if (peer->tls) {
        int put = SSL_write(peer->tls, from, size > INT32_MAX ? INT32_MAX : (int)size);
        if (put > 0) return put;
        errno = SSL_get_error(peer->tls, put) == SSL_ERROR_WANT_WRITE ? EAGAIN : ECONNRESET;
        return -1;
    }
#endif
    return send(peer->fd, from, size, MSG_NOSIGNAL);
}

static void watch(struct peer *peer, int how, bool writing) {
    struct epoll_event event = {.events = EPOLLIN | (writing ? EPOLLOUT : 0), .data.ptr = peer};
    if (epoll_ctl(poller, how, peer->fd, &event)) fail("epoll_ctl: %s", strerror(errno));
}

static char *room(struct peer *peer, size_t size) {
    if (peer->out_sent == peer->out_used) peer->out_sent = peer->out_used = 0;
    if (peer->out_used + size > peer->out_size) {
        while (peer->out_used + size > peer->out_size) peer->out_size = peer->out_size ? peer->out_size * 2 : 1024;
        if (!(peer->out = realloc(peer->out, peer->out_size))) fail("out of memory");
    }
    return peer->out + peer->out_used;
}

static void put(struct peer *peer, const void *from, size_t size) {
    memcpy(room(peer, size), from, size);
    peer->out_used += size;
}

static void flush(struct peer *peer) {
    while (peer->out_sent < peer->out_used) {
        ssize_t gone = give(peer, peer->out + peer->out_sent, peer->out_used - peer->out_sent);
        if (gone < 0 && errno != EAGAIN) fail("the broker closed a connection that was written to: %s", strerror(errno));
        if (gone < 0) break;
        peer->out_sent += (size_t)gone;
    }
    bool blocked = peer->out_sent < peer->out_used;
    if (blocked != peer->blocked) watch(peer, EPOLL_CTL_MOD, peer->blocked = blocked);
}

/* ------------------------------------------------------------ WebSocket */

static void knock(struct peer *peer, const char *path, const char *protocol) {
    char text[1024];
    int size = snprintf(text, sizeof text,
                        "GET %s HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                        "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: a2tra2tra2tra2tra2traw==\r\n%s%s%s%s%s%s\r\n",
                        path, given.port, *given.token ? "Authorization: Bearer " : "", given.token,
                        *given.token ? "\r\n" : "", *protocol ? "Sec-WebSocket-Protocol: " : "", protocol,
                        *protocol ? "\r\n" : "");
    if (give(peer, text, (size_t)size) != size) fail("the handshake could not be sent");
}

static void upgraded(struct peer *peer) {
    char reply[4096];
    size_t got = 0;
    while (got < 4 || memcmp(reply + got - 4, "\r\n\r\n", 4)) /* byte by byte: what follows is for the loop */
        if (got == sizeof reply || take(peer, reply + got++, 1) != 1) fail("no answer to the handshake");
    if (memcmp(reply, "HTTP/1.1 101", 12)) fail("%.*s", (int)got, reply);
}

/* The key is not zero, so that the broker has to unmask, and the same for all, which costs it nothing less. */
static const uint8_t MASK[8] = {0x5a, 0xc3, 0x17, 0x88, 0x5a, 0xc3, 0x17, 0x88};

static void frame(struct peer *peer, int opcode, const char *before, size_t before_size, uint64_t body,
                  const char *after, size_t after_size) {
    uint64_t size = before_size + body + after_size, key;
    unsigned char *at = (unsigned char *)room(peer, size + 14), *begun = at;
    *at++ = (unsigned char)(0x80 | opcode);
    if (size < 126) {
        *at++ = (unsigned char)(0x80 | size);
    } else if (size < 65536) {
        *at++ = 0x80 | 126, *at++ = (unsigned char)(size >> 8), *at++ = (unsigned char)size;
    } else {
        *at++ = 0x80 | 127;
        for (int shift = 56; shift >= 0; shift -= 8) *at++ = (unsigned char)(size >> shift);
    }
    memcpy(at, MASK, 4), at += 4;
    memcpy(at, before, before_size);
    memcpy(at + before_size, payload, body);
    memcpy(at + before_size + body, after, after_size);
    memcpy(&key, MASK, 8);
    uint64_t done = 0;
    for (uint64_t word; done + 8 <= size; done += 8)
        memcpy(&word, at + done, 8), word ^= key, memcpy(at + done, &word, 8);
    for (; done < size; done++) at[done] ^= MASK[done & 3];
    peer->out_used += (size_t)(at - begun) + size;
}

/* The head of a server's frame: its size and its text, if HEAD bytes of it, or all, are there. */
static long frame_head(const char *at, size_t size, const char **text, size_t *text_size, uint64_t *rest) {
    const unsigned char *byte = (const unsigned char *)at;
    if (size < 2) return 0;
    size_t head = byte[1] < 126 ? 2 : byte[1] == 126 ? 4 : 10;
    if (size < head) return 0;
    uint64_t body = byte[1];
    if (head > 2) {
        body = 0;
        for (size_t i = 2; i < head; i++) body = body << 8 | byte[i];
    }
    size_t wanted = body < HEAD - 16 ? body : HEAD - 16;
    if (size < head + wanted) return 0;
    *text = at + head, *text_size = wanted, *rest = body;
    return (long)head;
}

static bool control_frame(const char *at, const char *text, size_t size, struct message *got) {
    int opcode = at[0] & 15;
    if (opcode == 8) fail("the broker closed: %.*s", size > 2 ? (int)size - 2 : 0, text + 2);
    if (opcode == 9) got->kind = PINGED, got->id_size = (unsigned)size, memcpy(got->id, text, size);
    return opcode >= 8;
}

static void pong_frame(struct peer *peer, const struct message *got) {
    frame(peer, 10, got->id, got->id_size, 0, "", 0);
}

/* ------------------------------------------------------------ JSON-RPC 2.0 in WebSocket frames */

static void rpc_knock(struct peer *peer) {
    knock(peer, given.endpoints ? "/ws" : peer->role == WORKER ? given.worker_path : given.caller_path, "");
}

static void rpc_greet(struct peer *peer) {
    bool serves = given.endpoints && peer->role == WORKER;
    upgraded(peer);
    ready += !serves;
    for (unsigned number = peer->index; serves && number < given.endpoints; number += given.workers) {
        char text[256];
        int size = snprintf(text, sizeof text,
                            "{\"jsonrpc\":\"2.0\",\"id\":%u,\"method\":\"broker.serve\",\"params\":{\"endpoint\":\"e%u\"}}",
                            number, number);
        frame(peer, 1, text, (size_t)size, 0, "", 0);
    }
}

static long rpc_head(const char *at, size_t size, struct message *got, uint64_t *rest) {
    const char *text, *id;
    size_t text_size;
    long head = frame_head(at, size, &text, &text_size, rest);
    if (!head || control_frame(at, text, text_size, got)) return head;
    if (memmem(text, text_size < 80 ? text_size : 80, "\"broker.message\"", 16)) {
        got->kind = HEARD;
        return head;
    }
    if (!(id = memmem(text, text_size, "\"id\":", 5))) fail("a message without id: %.*s", (int)text_size, text);
    id += 5;
    size_t left = text_size - (size_t)(id - text), length = 0;
    while (length < left && id[length] != ',' && id[length] != '}') length++;
    const char *member = id + length + 1; /* behind the comma */
    if (left > length + 10 && !memcmp(member, "\"method\"", 8)) {
        got->kind = ASKED, got->id_size = (unsigned)(length < ID_MAX ? length : ID_MAX);
        memcpy(got->id, id, got->id_size);
        return head;
    }
    got->kind = left > length + 9 && !memcmp(member, "\"error\"", 7) ? FAILED : ANSWERED;
    got->number = strtoull(id, NULL, 10);
    if (got->kind == FAILED && !*first_failure) snprintf(first_failure, HEAD, "%.*s", (int)text_size, text);
    return head;
}

static void rpc_ask(struct peer *peer, uint64_t number) {
    char text[256], target[32] = "";
    if (given.endpoints) snprintf(target, sizeof target, "e%llu/", (unsigned long long)(asked % given.endpoints));
    int size = snprintf(text, sizeof text, "{\"jsonrpc\":\"2.0\",\"id\":%llu,\"method\":\"%secho\",\"params\":{\"data\":\"",
                        (unsigned long long)number, target);
    frame(peer, 1, text, (size_t)size, given.bytes, "\"}}", 3);
}

static void rpc_answer(struct peer *peer, const struct message *got) {
    char text[256];
    int size = snprintf(text, sizeof text, "{\"jsonrpc\":\"2.0\",\"id\":%.*s,\"result\":\"", (int)got->id_size, got->id);
    frame(peer, 1, text, (size_t)size, given.reply_bytes, "\"}", 2);
}

static void rpc_publish(struct peer *peer) {
    static const char text[] =
        "{\"jsonrpc\":\"2.0\",\"id\":0,\"method\":\"broker.publish\",\"params\":{\"endpoint\":\"echo\",\"data\":\"";
    frame(peer, 1, text, sizeof text - 1, given.bytes, "\"}}", 3);
}

/* ------------------------------------------------------------ NATS */

static void nats_knock(struct peer *peer) { (void)peer; }

static void nats_greet(struct peer *peer) {
    char text[1024], line[2048];
    size_t got = 0;
    while (!got || line[got - 1] != '\n')
        if (got == sizeof line || take(peer, line + got++, 1) != 1) fail("no INFO");
    int size = snprintf(text, sizeof text, "CONNECT {\"verbose\":false,\"pedantic\":false}\r\n");
    if (peer->role == WORKER) size += snprintf(text + size, 100, "SUB echo workers 1\r\n");
    if (peer->role == CALLER) size += snprintf(text + size, 100, "SUB inbox.%u.* 1\r\n", peer->index);
    if (peer->role == LISTENER) size += snprintf(text + size, 100, "SUB told 1\r\n");
    size += snprintf(text + size, 100, "PING\r\n");
    put(peer, text, (size_t)size);
}

static long nats_head(const char *at, size_t size, struct message *got, uint64_t *rest) {
    const char *end = memchr(at, '\n', size);
    *rest = 0;
    if (!end) return size >= HEAD - 1 ? (fail("a line without end"), 0) : 0;
    long head = end - at + 1;
    if (!memcmp(at, "PING", 4)) {
        got->kind = PINGED;
    } else if (!memcmp(at, "PONG", 4)) {
        got->kind = READY;
    } else if (!memcmp(at, "MSG ", 4)) {
        char line[HEAD], subject[128], third[128], fourth[32];
        snprintf(line, sizeof line, "%.*s", (int)head, at); /* sscanf would read on in the payload */
        int words = sscanf(line, "MSG %127s %*s %127s %31s", subject, third, fourth);
        *rest = strtoull(words == 3 ? fourth : third, NULL, 10) + 2;
        if (words == 3) {
            got->kind = ASKED, got->id_size = (unsigned)strlen(third);
            memcpy(got->id, third, got->id_size);
        } else if (!memcmp(subject, "inbox.", 6)) {
            got->kind = ANSWERED, got->number = strtoull(strrchr(subject, '.') + 1, NULL, 10);
        } else {
            got->kind = HEARD;
        }
    } else if (memcmp(at, "+OK", 3) && memcmp(at, "INFO", 4)) {
        fail("nats said %.*s", (int)head, at);
    }
    return head;
}

static void nats_ask(struct peer *peer, uint64_t number) {
    char text[256];
    put(peer, text, (size_t)snprintf(text, sizeof text, "PUB echo inbox.%u.%llu %llu\r\n", peer->index,
                                     (unsigned long long)number, (unsigned long long)given.bytes));
    put(peer, payload, given.bytes), put(peer, "\r\n", 2);
}

static void nats_answer(struct peer *peer, const struct message *got) {
    char text[256];
    put(peer, text, (size_t)snprintf(text, sizeof text, "PUB %.*s %llu\r\n", (int)got->id_size, got->id,
                                     (unsigned long long)given.reply_bytes));
    put(peer, payload, given.reply_bytes), put(peer, "\r\n", 2);
}

static void nats_publish(struct peer *peer) {
    char text[64];
    put(peer, text, (size_t)snprintf(text, sizeof text, "PUB told %llu\r\n", (unsigned long long)given.bytes));
    put(peer, payload, given.bytes), put(peer, "\r\n", 2);
}

static void nats_pong(struct peer *peer, const struct message *got) {
    (void)got;
    put(peer, "PONG\r\n", 6);
}

/* ------------------------------------------------------------ WAMP 2 (Crossbar) */

static void wamp_say(struct peer *peer, const char *text) { frame(peer, 1, text, strlen(text), 0, "", 0); }

static void wamp_knock(struct peer *peer) { knock(peer, given.caller_path, "wamp.2.json"); }

static void wamp_greet(struct peer *peer) {
    upgraded(peer);
    wamp_say(peer, "[1,\"realm1\",{\"roles\":{\"caller\":{},\"callee\":{},\"publisher\":{},\"subscriber\":{}}}]");
}

static long wamp_head(const char *at, size_t size, struct message *got, uint64_t *rest) {
    const char *text;
    size_t text_size;
    long head = frame_head(at, size, &text, &text_size, rest);
    if (!head || control_frame(at, text, text_size, got)) return head;
    switch (strtol(text + 1, NULL, 10)) {
    case 2: got->kind = READY, got->number = 1; break;           /* WELCOME */
    case 33: case 65: got->kind = READY, got->number = 2; break; /* SUBSCRIBED, REGISTERED */
    case 50: got->kind = ANSWERED; break;                        /* RESULT */
    case 36: got->kind = HEARD; return head;                     /* EVENT */
    case 68: got->kind = ASKED; break;                           /* INVOCATION */
    default: fail("crossbar said %.*s", (int)text_size, text);
    }
    if (got->kind != READY) {
        const char *second = memchr(text, ',', text_size);
        got->number = strtoull(second + 1, NULL, 10);
        got->id_size = (unsigned)snprintf(got->id, ID_MAX, "%llu", (unsigned long long)got->number);
        got->number -= got->kind == ANSWERED; /* its request ids begin with 1 */
    }
    return head;
}

static void wamp_ask(struct peer *peer, uint64_t number) {
    char text[128];
    int size = snprintf(text, sizeof text, "[48,%llu,{},\"com.echo\",[\"", (unsigned long long)number + 1);
    frame(peer, 1, text, (size_t)size, given.bytes, "\"]]", 3);
}

static void wamp_answer(struct peer *peer, const struct message *got) {
    char text[128];
    int size = snprintf(text, sizeof text, "[70,%.*s,{},[\"", (int)got->id_size, got->id);
    frame(peer, 1, text, (size_t)size, given.reply_bytes, "\"]]", 3);
}

static void wamp_publish(struct peer *peer) {
    char text[128];
    int size = snprintf(text, sizeof text, "[16,%llu,{},\"com.told\",[\"", (unsigned long long)++published);
    published--;
    frame(peer, 1, text, (size_t)size, given.bytes, "\"]]", 3);
}

static void wamp_welcomed(struct peer *peer) {
    if (peer->role == WORKER) wamp_say(peer, "[64,1,{\"invoke\":\"roundrobin\"},\"com.echo\"]");
    else if (peer->role == LISTENER) wamp_say(peer, "[32,1,{},\"com.told\"]");
    else ready++;
}

static const struct dialect DIALECTS[] = {
    {"rpc", rpc_knock, rpc_greet, rpc_head, rpc_ask, rpc_answer, rpc_publish, pong_frame},
    {"nats", nats_knock, nats_greet, nats_head, nats_ask, nats_answer, nats_publish, nats_pong},
    {"wamp", wamp_knock, wamp_greet, wamp_head, wamp_ask, wamp_answer, wamp_publish, pong_frame},
};

/* ------------------------------------------------------------ what each does with what it gets */

static void ask(struct peer *peer, uint64_t number) {
    if (given.count && asked >= given.count) return;
    peer->sent_at[number] = now_ns();
    dialect->ask(peer, number);
    asked++;
}

static void publish(struct peer *publisher) {
    dialect->publish(publisher);
    published++;
    flush(publisher);
}

static void answer(struct peer *peer) {
    if (!given.hold) {
        dialect->answer(peer, &peer->got);
        return;
    }
    peer->held[(peer->held_first + peer->held_count++) % (given.hold + 1)] = peer->got;
    if (peer->held_count > given.hold) {
        dialect->answer(peer, &peer->held[peer->held_first]);
        peer->held_first = (peer->held_first + 1) % (given.hold + 1), peer->held_count--;
    }
}

static void finished(struct peer *peer) { /* the message is there as a whole */
    const struct message *got = &peer->got;
    switch (got->kind) {
    case ASKED: answer(peer); break;
    case PINGED: dialect->pong(peer, got); break;
    case HEARD: heard++; break;
    case READY:
        if (dialect->greet == wamp_greet && got->number == 1) wamp_welcomed(peer);
        else ready++;
        break;
    case FAILED:
    case ANSWERED:
        failed += got->kind == FAILED;
        if (peer->role == WORKER) ready++; /* broker.serve was answered */
        if (peer->role != CALLER) break;
        completed++;
        note(now_ns() - peer->sent_at[got->number]);
        ask(peer, got->number);
        break;
    case NOTHING: break;
    }
}

static void parse(struct peer *peer, const char *at, size_t size) {
    for (;;) {
        if (peer->skip) {
            uint64_t step = peer->skip < size ? peer->skip : size;
            at += step, size -= step, peer->skip -= step;
            if (peer->skip) break;
            finished(peer);
        }
        if (!size) break;
        peer->got.kind = NOTHING;
        long head = dialect->head(at, size, &peer->got, &peer->skip);
        if (!head) break;
        at += head, size -= (size_t)head;
        if (!peer->skip) finished(peer);
    }
    if (size > HEAD) fail("a head of more than %d bytes", HEAD);
    memcpy(peer->carried, at, peer->carry = size);
}

static void readable(struct peer *peer) {
    static char buffer[HEAD + READ];
    for (ssize_t got = READ; got == READ;) {
        memcpy(buffer, peer->carried, peer->carry);
        got = take(peer, buffer + peer->carry, READ);
        if (got < 0 && errno == EAGAIN) break;
        if (got <= 0) fail("the broker closed a connection; first failure: %s", first_failure);
        bytes_read += (uint64_t)got;
        parse(peer, buffer, peer->carry + (size_t)got);
#ifdef WITH_TLS
        if (peer->tls) got = READ; /* records come one by one */
#endif
    }
    if (peer->out_used > peer->out_sent && !peer->blocked) flush(peer);
}

static void turn(int timeout_ms) {
    struct epoll_event events[512];
    int count = epoll_wait(poller, events, 512, timeout_ms);
    for (int i = 0; i < count; i++) {
        struct peer *peer = events[i].data.ptr;
        if (events[i].events & EPOLLOUT) flush(peer);
        if (events[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR)) readable(peer);
    }
}

/* ------------------------------------------------------------ setting up */

static void connected(struct peer *peer, enum role role, unsigned index) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)given.port),
                                  .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int on = 1;
    *peer = (struct peer){.fd = socket(AF_INET, SOCK_STREAM, 0), .role = role, .index = index};
    if (connect(peer->fd, (struct sockaddr *)&address, sizeof address)) fail("connect: %s", strerror(errno));
    setsockopt(peer->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
#ifdef WITH_TLS
    if (given.tls) {
        static SSL_CTX *context;
        if (!context && !(context = SSL_CTX_new(TLS_client_method()))) fail("no TLS");
        SSL_CTX_set_mode(context, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
        peer->tls = SSL_new(context);
        SSL_set_fd(peer->tls, peer->fd);
        if (SSL_connect(peer->tls) != 1) fail("TLS handshake failed");
    }
#endif
    dialect->knock(peer);
}

static struct peer *add(enum role role, unsigned count) {
    struct peer *first = peers + peers_count;
    for (unsigned i = 0; i < count; i++) {
        struct peer *peer = peers + peers_count++;
        connected(peer, role, i);
        dialect->greet(peer);
        if (role == CALLER && !(peer->sent_at = calloc(given.flight, sizeof *peer->sent_at))) fail("out of memory");
        if (role == WORKER && given.hold) peer->held = calloc(given.hold + 1, sizeof *peer->held);
        fcntl(peer->fd, F_SETFL, O_NONBLOCK);
        watch(peer, EPOLL_CTL_ADD, false);
        flush(peer);
    }
    return first;
}

static void wait_ready(uint64_t wanted) {
    uint64_t ends_at = now_ns() + STUCK_S * 1000000000ull;
    while (ready < wanted) {
        turn(100);
        if (now_ns() > ends_at) fail("%llu of %llu are ready", (unsigned long long)ready, (unsigned long long)wanted);
    }
}

/* ------------------------------------------------------------ the modes */

static uint64_t done(void) { return !strcmp(given.mode, "publish") ? heard : completed; }

struct snapshot { uint64_t at, done, bytes; double cpu_s, own_s; };

static struct snapshot snapshot(void) {
    struct rusage own;
    getrusage(RUSAGE_SELF, &own);
    return (struct snapshot){now_ns(), done(), bytes_read, broker_cpu_s(),
                             (double)(own.ru_utime.tv_sec + own.ru_stime.tv_sec) +
                                 (double)(own.ru_utime.tv_usec + own.ru_stime.tv_usec) / 1e6};
}

static void report(struct snapshot from, double kib_before) {
    struct snapshot to = snapshot();
    double n = (double)(to.done - from.done), s = (double)(to.at - from.at) / 1e9;
    if (n == 0) fail("nothing was completed; first failure: %s", first_failure);
    printf("{\"completed\": %.0f, \"seconds\": %.3f, \"per_s\": %.0f, \"cpu_us\": %.4f, \"generator_us\": %.4f, "
           "\"p50_us\": %.1f, \"p99_us\": %.1f, \"bytes_each\": %.1f, \"failed\": %llu, \"rss_kib\": %.0f, "
           "\"grown_kib\": %.0f}\n",
           n, s, n / s, (to.cpu_s - from.cpu_s) / n * 1e6, (to.own_s - from.own_s) / n * 1e6, quantile_us(0.5),
           quantile_us(0.99), (double)(to.bytes - from.bytes) / n, (unsigned long long)failed, broker_kib(),
           broker_kib() - kib_before);
    if (*first_failure) fprintf(stderr, "first failure: %s\n", first_failure);
}

/* Let the load run: first to warm up, then measured. A publication follows when the last one has reached everybody. */
static void run(struct peer *publisher, uint64_t warm_count, double kib_before) {
    struct snapshot from = snapshot();
    uint64_t moved_at = from.at, seen = 0;
    bool measuring = given.count > 0;
    for (;;) {
        turn(100);
        if (publisher && heard >= published * given.listeners) publish(publisher);
        uint64_t at = now_ns();
        if (done() != seen) seen = done(), moved_at = at;
        if (at - moved_at > STUCK_S * 1000000000ull) fail("nothing moves; first failure: %s", first_failure);
        double s = (double)(at - from.at) / 1e9;
        if (!measuring && s >= given.warm_s && done() >= warm_count) {
            memset(histogram, 0, sizeof histogram);
            from = snapshot(), measuring = true;
        } else if (measuring && (given.count ? done() >= given.count : s >= given.seconds && done() > from.done)) {
            report(from, kib_before);
            return;
        }
    }
}

static void ask_mode(void) {
    add(WORKER, given.workers);
    struct peer *callers = add(CALLER, given.callers);
    wait_ready((given.endpoints ? given.endpoints : given.workers) + given.callers);
    double kib_before = broker_kib();
    for (unsigned i = 0; i < given.callers; i++) {
        for (unsigned k = 0; k < given.flight; k++) ask(&callers[i], k);
        flush(&callers[i]);
        while (callers[i].blocked) turn(100); /* so that what is not yet taken does not pile up here */
    }
    run(NULL, (uint64_t)given.callers * given.flight, kib_before);
}

static void publish_mode(void) {
    add(LISTENER, given.listeners);
    struct peer *publisher = add(PUBLISHER, 1);
    wait_ready(given.listeners + 1);
    double kib_before = broker_kib();
    publish(publisher);
    run(publisher, 0, kib_before);
}

static void idle_mode(void) {
    double kib_before = broker_kib();
    add(LISTENER, given.idle);
    wait_ready(given.idle);
    uint64_t ends_at = now_ns() + (uint64_t)(given.seconds * 1e9);
    while (now_ns() < ends_at) turn(50);
    printf("{\"connections\": %u, \"kib_each\": %.3f}\n", given.idle, (broker_kib() - kib_before) / given.idle);
}

static void welcomed(struct peer *peer) { /* the dialect's own hello has been answered, and the connection ends */
    char bytes[HEAD];
    dialect->greet(peer);
    if (peer->out_used && (give(peer, peer->out, peer->out_used) < 0 || take(peer, bytes, sizeof bytes) <= 0))
        fail("no welcome");
    free(peer->out);
#ifdef WITH_TLS
    if (peer->tls) SSL_free(peer->tls);
#endif
    close(peer->fd);
}

static void accept_mode(void) {
    struct snapshot from = snapshot();
    uint64_t count = 0;
    bool measuring = false;
    for (;;) {
        for (unsigned i = 0; i < given.idle; i++) connected(peers + i, LISTENER, i);
        for (unsigned i = 0; i < given.idle; i++) welcomed(peers + i);
        count += given.idle;
        double s = (double)(now_ns() - from.at) / 1e9;
        if (!measuring && s >= given.warm_s) {
            from = snapshot(), count = 0, measuring = true;
        } else if (measuring && s >= given.seconds) {
            double cpu_s = broker_cpu_s() - from.cpu_s;
            printf("{\"accepted\": %llu, \"per_s\": %.0f, \"cpu_us\": %.2f, \"per_cpu_s\": %.0f}\n",
                   (unsigned long long)count, (double)count / s, cpu_s / (double)count * 1e6, (double)count / cpu_s);
            return;
        }
    }
}

/* ------------------------------------------------------------ the command line */

static void read_pids(char *text) {
    for (char *word = strtok(text, ","); word && given.pids_count < PIDS_MAX; word = strtok(NULL, ","))
        given.pids[given.pids_count++] = atoi(word);
}

static void read_options(int count, char **words) {
    enum { PORT = 256, DIALECT, MODE, CALLERS, FLIGHT, WORKERS, LISTENERS, IDLE, ENDPOINTS, HOLD, BYTES, REPLY_BYTES,
           COUNT, WARM, SECONDS, TOKEN, CALLER_PATH, WORKER_PATH, BROKER, TLS };
    static const struct option options[] = {
        {"port", 1, 0, PORT}, {"dialect", 1, 0, DIALECT}, {"mode", 1, 0, MODE},
        {"callers", 1, 0, CALLERS},         /* connections that ask */
        {"flight", 1, 0, FLIGHT},           /* requests in flight of each */
        {"workers", 1, 0, WORKERS},         /* connections that answer */
        {"hold", 1, 0, HOLD},               /* requests a worker keeps before it answers the oldest */
        {"endpoints", 1, 0, ENDPOINTS},     /* so many, shared out to the workers with broker.serve; 0: one, by path */
        {"listeners", 1, 0, LISTENERS},     /* publish: who hear it */
        {"idle", 1, 0, IDLE},               /* idle: connections; accept: so many at a time */
        {"bytes", 1, 0, BYTES}, {"reply-bytes", 1, 0, REPLY_BYTES},
        {"count", 1, 0, COUNT},             /* so many requests in all, from the first on, instead of a time */
        {"warm", 1, 0, WARM}, {"seconds", 1, 0, SECONDS},
        {"token", 1, 0, TOKEN}, {"caller-path", 1, 0, CALLER_PATH}, {"worker-path", 1, 0, WORKER_PATH},
        {"broker", 1, 0, BROKER},           /* process ids, with commas: whose time is measured */
        {"tls", 0, 0, TLS}, {0, 0, 0, 0}};
    given.reply_bytes = UINT64_MAX;
    for (int option; (option = getopt_long(count, words, "", options, NULL)) != -1;) {
        switch (option) {
        case PORT: given.port = atoi(optarg); break;
        case DIALECT:
            for (size_t i = 0; i < sizeof DIALECTS / sizeof *DIALECTS; i++)
                if (!strcmp(DIALECTS[i].name, optarg)) dialect = &DIALECTS[i];
            break;
        case MODE: given.mode = optarg; break;
        case CALLERS: given.callers = (unsigned)atoi(optarg); break;
        case FLIGHT: given.flight = (unsigned)atoi(optarg); break;
        case WORKERS: given.workers = (unsigned)atoi(optarg); break;
        case LISTENERS: given.listeners = (unsigned)atoi(optarg); break;
        case IDLE: given.idle = (unsigned)atoi(optarg); break;
        case ENDPOINTS: given.endpoints = (unsigned)atoi(optarg); break;
        case HOLD: given.hold = (unsigned)atoi(optarg); break;
        case BYTES: given.bytes = strtoull(optarg, NULL, 10); break;
        case REPLY_BYTES: given.reply_bytes = strtoull(optarg, NULL, 10); break;
        case COUNT: given.count = strtoull(optarg, NULL, 10); break;
        case WARM: given.warm_s = atof(optarg); break;
        case SECONDS: given.seconds = atof(optarg); break;
        case TOKEN: given.token = optarg; break;
        case CALLER_PATH: given.caller_path = optarg; break;
        case WORKER_PATH: given.worker_path = optarg; break;
        case BROKER: read_pids(optarg); break;
        case TLS: given.tls = true; break;
        default: exit(2);
        }
    }
    if (!dialect || !given.port || optind < count) fail("--port and --dialect rpc, nats or wamp are needed");
    if (given.reply_bytes == UINT64_MAX) given.reply_bytes = given.bytes;
#ifndef WITH_TLS
    if (given.tls) fail("built without TLS: no OpenSSL headers were found");
#endif
}

int main(int count, char **words) {
    struct rlimit files;
    read_options(count, words);
    getrlimit(RLIMIT_NOFILE, &files), files.rlim_cur = files.rlim_max, setrlimit(RLIMIT_NOFILE, &files);
    uint64_t largest = given.bytes > given.reply_bytes ? given.bytes : given.reply_bytes;
    payload = malloc(largest + 1), memset(payload, 'x', largest + 1);
    peers = calloc(given.callers + given.workers + given.listeners + given.idle + 2, sizeof *peers);
    poller = epoll_create1(0);
    if (!strcmp(given.mode, "ask")) ask_mode();
    else if (!strcmp(given.mode, "publish")) publish_mode();
    else if (!strcmp(given.mode, "idle")) idle_mode();
    else if (!strcmp(given.mode, "accept")) accept_mode();
    else fail("no such mode: %s", given.mode);
    return 0;
}
