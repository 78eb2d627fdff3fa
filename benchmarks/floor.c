/* What the system calls alone cost: the same frames taken in, given to a worker, matched and given back, in C.

   It speaks as much of the broker's JSON-RPC over WebSocket as generator.c says, and trusts it: the id is searched for
   and replaced, nothing else is looked at. There is no authentication, no limit, no deadline, no metric, no fairness.
   Writes are joined once per turn of the loop, as the broker does.

   floor           prints the port it listens on, and serves until it is killed */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

enum { READ = 1 << 18, SLOTS = 1 << 21, ID_MAX = 24 };

struct peer {
    int fd;
    bool upgraded, worker, dirty, blocked;
    char *in, *out;
    size_t in_size, in_used, out_size, out_used, out_sent;
};

struct pending { struct peer *caller; char id[ID_MAX]; unsigned id_size; };

static int poller;
static struct peer **workers, **listeners, *dirty[1 << 17];
static unsigned workers_count, listeners_count, dirty_count, next_worker;
static struct pending *pending;
static uint64_t next_slot;

static char *room(struct peer *peer, size_t size) {
    if (!peer->dirty) peer->dirty = true, dirty[dirty_count++] = peer;
    if (peer->out_used + size > peer->out_size) {
        while (peer->out_used + size > peer->out_size) peer->out_size = peer->out_size ? peer->out_size * 2 : 1024;
        peer->out = realloc(peer->out, peer->out_size);
    }
    return peer->out + peer->out_used;
}

static void send_frame(struct peer *peer, const char *before, size_t before_size, const char *after, size_t after_size) {
    size_t size = before_size + after_size;
    unsigned char *at = (unsigned char *)room(peer, size + 10), *begun = at;
    *at++ = 0x81;
    if (size < 126) {
        *at++ = (unsigned char)size;
    } else if (size < 65536) {
        *at++ = 126, *at++ = (unsigned char)(size >> 8), *at++ = (unsigned char)size;
    } else {
        *at++ = 127;
        for (int shift = 56; shift >= 0; shift -= 8) *at++ = (unsigned char)((uint64_t)size >> shift);
    }
    memcpy(at, before, before_size), memcpy(at + before_size, after, after_size);
    peer->out_used += (size_t)(at - begun) + size;
}

static void flush(struct peer *peer) {
    if (peer->fd < 0) {
        peer->out_sent = peer->out_used = 0;
        return;
    }
    while (peer->out_sent < peer->out_used) {
        ssize_t gone = send(peer->fd, peer->out + peer->out_sent, peer->out_used - peer->out_sent, MSG_NOSIGNAL);
        if (gone < 0) break;
        peer->out_sent += (size_t)gone;
    }
    bool blocked = peer->out_sent < peer->out_used;
    if (!blocked) peer->out_sent = peer->out_used = 0;
    if (blocked != peer->blocked) {
        struct epoll_event event = {.events = EPOLLIN | (blocked ? EPOLLOUT : 0), .data.ptr = peer};
        peer->blocked = blocked;
        epoll_ctl(poller, EPOLL_CTL_MOD, peer->fd, &event);
    }
}

static void asked(struct peer *caller, const char *id, size_t id_size, const char *rest, size_t rest_size) {
    char text[64];
    if (!workers_count) exit(1);
    uint64_t slot = next_slot++ % SLOTS;
    pending[slot].caller = caller, pending[slot].id_size = (unsigned)id_size;
    memcpy(pending[slot].id, id, id_size < ID_MAX ? id_size : ID_MAX);
    int size = snprintf(text, sizeof text, "{\"jsonrpc\":\"2.0\",\"id\":\"%llu\"", (unsigned long long)slot);
    send_frame(workers[next_worker++ % workers_count], text, (size_t)size, rest, rest_size);
}

static void answered(const char *id, const char *rest, size_t rest_size) {
    char text[64];
    struct pending *request = &pending[strtoull(id + 1, NULL, 10) % SLOTS];
    int size = snprintf(text, sizeof text, "{\"jsonrpc\":\"2.0\",\"id\":%.*s", (int)request->id_size, request->id);
    send_frame(request->caller, text, (size_t)size, rest, rest_size);
}

static void message(struct peer *peer, const char *text, size_t size) {
    static const char told[] = "{\"jsonrpc\":\"2.0\",\"method\":\"broker.message\"";
    const char *id = memmem(text, size < 256 ? size : 256, "\"id\":", 5);
    if (!id) return;
    id += 5;
    size_t id_size = strcspn(id, ",}"), rest_size = size - (size_t)(id - text) - id_size;
    const char *rest = id + id_size;
    if (peer->worker) {
        answered(id, rest, rest_size);
    } else if (memmem(rest, rest_size < 64 ? rest_size : 64, "broker.publish", 14)) {
        const char *params = strchr(rest + 1, ',');
        for (unsigned i = 0; i < listeners_count; i++)
            send_frame(listeners[i], told, sizeof told - 1, params, rest_size - (size_t)(params - rest));
    } else {
        asked(peer, id, id_size, rest, rest_size);
    }
}

static size_t handshake(struct peer *peer) {
    static const char reply[] = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                                "Sec-WebSocket-Accept: 5nMrzDl2tLdHP0CYOkKZLxE5hvI=\r\n\r\n"; /* nobody checks it */
    char *end = memmem(peer->in, peer->in_used, "\r\n\r\n", 4), *line = memchr(peer->in, '\n', peer->in_used);
    if (!end) return 0;
    peer->upgraded = true;
    peer->worker = memmem(peer->in, (size_t)(line - peer->in), "role=worker", 11) != NULL;
    if (peer->worker) workers[workers_count++] = peer;
    else listeners[listeners_count++] = peer;
    memcpy(room(peer, sizeof reply), reply, sizeof reply - 1);
    peer->out_used += sizeof reply - 1;
    return (size_t)(end - peer->in) + 4;
}

static size_t one_frame(struct peer *peer, char *at, size_t left) {
    const unsigned char *byte = (const unsigned char *)at;
    if (left < 6) return 0;
    size_t head = (byte[1] & 127) < 126 ? 2 : (byte[1] & 127) == 126 ? 4 : 10;
    if (left < head + 4) return 0;
    uint64_t size = byte[1] & 127, key;
    if (head > 2) {
        size = 0;
        for (size_t i = 2; i < head; i++) size = size << 8 | byte[i];
    }
    if (left < head + 4 + size) return 0;
    char *text = at + head + 4;
    memcpy(&key, at + head, 4), memcpy((char *)&key + 4, at + head, 4);
    uint64_t done = 0;
    for (uint64_t word; done + 8 <= size; done += 8)
        memcpy(&word, text + done, 8), word ^= key, memcpy(text + done, &word, 8);
    for (; done < size; done++) text[done] ^= ((char *)&key)[done & 7];
    message(peer, text, size);
    return head + 4 + size;
}

static void forget(struct peer **list, unsigned *count, struct peer *peer) {
    for (unsigned i = 0; i < *count; i++)
        if (list[i] == peer) list[i] = list[--*count];
}

static void readable(struct peer *peer) {
    for (ssize_t got = READ; got == READ;) {
        if (peer->in_size < peer->in_used + READ) peer->in = realloc(peer->in, peer->in_size = peer->in_used + READ);
        got = recv(peer->fd, peer->in + peer->in_used, READ, MSG_DONTWAIT);
        if (got < 0) break;
        if (got == 0) {
            epoll_ctl(poller, EPOLL_CTL_DEL, peer->fd, NULL);
            close(peer->fd);
            peer->fd = -1; /* the number may be another's at once; what is still to be said is for nobody */
            forget(listeners, &listeners_count, peer);
            forget(workers, &workers_count, peer);
            return;
        }
        peer->in_used += (size_t)got;
        size_t used = peer->upgraded ? 0 : handshake(peer);
        if (!peer->upgraded) continue;
        for (size_t step; (step = one_frame(peer, peer->in + used, peer->in_used - used));) used += step;
        memmove(peer->in, peer->in + used, peer->in_used -= used);
    }
    if (!peer->in_used) free(peer->in), peer->in = NULL, peer->in_size = 0; /* an idle connection needs none */
}

static void accept_all(int listening) {
    for (int fd, on = 1; (fd = accept4(listening, NULL, NULL, SOCK_NONBLOCK)) >= 0;) {
        struct peer *peer = calloc(1, sizeof *peer);
        struct epoll_event event = {.events = EPOLLIN, .data.ptr = peer};
        peer->fd = fd;
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        epoll_ctl(poller, EPOLL_CTL_ADD, fd, &event);
    }
}

int main(void) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof address;
    struct rlimit files;
    struct epoll_event events[512], event = {.events = EPOLLIN};
    getrlimit(RLIMIT_NOFILE, &files), files.rlim_cur = files.rlim_max, setrlimit(RLIMIT_NOFILE, &files);
    pending = calloc(SLOTS, sizeof *pending);
    workers = calloc(1 << 17, sizeof *workers), listeners = calloc(1 << 17, sizeof *listeners);
    poller = epoll_create1(0);
    int listening = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    if (bind(listening, (struct sockaddr *)&address, size) || listen(listening, 4096)) return 1;
    epoll_ctl(poller, EPOLL_CTL_ADD, listening, &event);
    getsockname(listening, (struct sockaddr *)&address, &size);
    printf("floor on port %d\n", ntohs(address.sin_port));
    fflush(stdout);
    for (;;) {
        int count = epoll_wait(poller, events, 512, -1);
        for (int i = 0; i < count; i++) {
            struct peer *peer = events[i].data.ptr;
            if (!peer) accept_all(listening);
            else if (events[i].events & EPOLLOUT) flush(peer);
            if (peer && events[i].events & EPOLLIN) readable(peer);
        }
        while (dirty_count) {
            struct peer *peer = dirty[--dirty_count];
            peer->dirty = false;
            if (!peer->blocked) flush(peer);
        }
    }
}
