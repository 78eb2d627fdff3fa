/* The hot path of the wire in C: whole, plain frames in, events out; common messages in, whole frames out.

   It only ever *accepts*. Whatever is not the common case, or not right, is left to the Python of `wire.frames` and
   `wire.jsonrpc`, which judges it: `Reader.read` stops before such a frame, or hands its payload on as it is, and
   `Writer.write` says False. So there is one place for every rule, and this file knows only what plain looks like:

     {"jsonrpc": "2.0", "id": 7, "method": "read", "params": …}     members in any order, none twice, no other
     {"jsonrpc": "2.0", "id": "<ours>", "result": …}

   Params and results are checked to be JSON (RFC 8259) and copied as they are.

   Objects of the core and of the links are reached by the offsets of their slots, which `know` looks up once, and only
   after their exact type has been seen. Everything here runs under the GIL of the main interpreter: a free-threaded
   Python turns its GIL on when it imports this module, an interpreter with a GIL of its own refuses to import it. */

#include "_native.h"
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <structmember.h> /* T_OBJECT_EX, which 3.12 calls Py_T_OBJECT_EX and has without this header */
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#define DEPTH_MAX 64           /* deeper nesting is left to Python */
#define ID_MAX 128             /* bytes of a string id, as in wire.jsonrpc */
#define DIGITS_MAX 18          /* of a number that needs no closer look */
#define SMALL_MAX 61440        /* bytes of a payload that the Writer takes */
#define COPIED_MAX 12288       /* bytes of a payload up to which it stands in one piece with its frame */
#define UNSPLIT_MAX 65535      /* bytes of a frame's payload with a 16-bit length: the Writer makes no larger ones */
#ifndef MSG_NOSIGNAL
#define MSG_NOSIGNAL 0         /* Python ignores SIGPIPE, an embedding program may not; macOS has it as an option only */
#endif

typedef const unsigned char *Text;

/* ------------------------------------------------------------------ JSON */

#if defined(__SSE2__)
/* Where a string ends, or needs a closer look, among 16 bytes. */
static inline __m128i string_hits(Text p)
{
    const __m128i quote = _mm_set1_epi8('"'), slash = _mm_set1_epi8('\\'), blank = _mm_set1_epi8(0x1F);
    __m128i b = _mm_loadu_si128((const __m128i *)p);
    return _mm_or_si128(_mm_or_si128(_mm_cmpeq_epi8(b, quote), _mm_cmpeq_epi8(b, slash)),
                        _mm_cmpeq_epi8(_mm_min_epu8(b, blank), b));
}
#endif

/* The end of a string whose first byte after the quote is at p: at its closing quote. NULL if it is not plain:
   control characters, escapes that are wrong or half of a surrogate pair. */
static Text string_end(Text p, Text end)
{
    for (;;) {
#if defined(__SSE2__)
        while (end - p >= 64) { /* four at once, for long strings: 16 KiB in half the time */
            __m128i hits = _mm_or_si128(_mm_or_si128(string_hits(p), string_hits(p + 16)),
                                        _mm_or_si128(string_hits(p + 32), string_hits(p + 48)));
            if (_mm_movemask_epi8(hits))
                break;
            p += 64;
        }
        while (end - p >= 16) {
            int mask = _mm_movemask_epi8(string_hits(p));
            if (mask) {
                p += __builtin_ctz((unsigned)mask);
                break;
            }
            p += 16;
        }
#endif
        while (p < end && *p != '"' && *p != '\\' && *p >= 0x20)
            p++;
        if (p >= end || *p < 0x20)
            return NULL;
        if (*p == '"')
            return p;
        if (end - p < 2)
            return NULL;
        switch (p[1]) {
        case '"': case '\\': case '/': case 'b': case 'f': case 'n': case 'r': case 't':
            p += 2;
            break;
        case 'u': {
            unsigned code = 0;
            if (end - p < 6)
                return NULL;
            for (int i = 2; i < 6; i++) {
                unsigned c = p[i], digit;
                if (c >= '0' && c <= '9') digit = c - '0';
                else if ((c | 0x20) >= 'a' && (c | 0x20) <= 'f') digit = (c | 0x20) - 'a' + 10;
                else return NULL;
                code = code << 4 | digit;
            }
            if (code >= 0xD800 && code <= 0xDFFF)
                return NULL;
            p += 6;
            break;
        }
        default:
            return NULL;
        }
    }
}

static inline Text skip_blanks(Text p, Text end)
{
    while (p < end && (*p == ' ' || *p == '\t' || *p == '\n' || *p == '\r'))
        p++;
    return p;
}

static Text number_end(Text p, Text end)
{
    if (p < end && *p == '-')
        p++;
    if (p >= end)
        return NULL;
    if (*p == '0')
        p++;
    else if (*p >= '1' && *p <= '9')
        while (p < end && *p >= '0' && *p <= '9') p++;
    else
        return NULL;
    if (p < end && *p == '.') {
        Text digits = ++p;
        while (p < end && *p >= '0' && *p <= '9') p++;
        if (p == digits) return NULL;
    }
    if (p < end && (*p == 'e' || *p == 'E')) {
        p++;
        if (p < end && (*p == '+' || *p == '-')) p++;
        Text digits = p;
        while (p < end && *p >= '0' && *p <= '9') p++;
        if (p == digits) return NULL;
    }
    return p;
}

static int is_base64_key(Text p, Text end)
{
    return end - p >= 8 && memcmp(p, "$base64\"", 8) == 0;
}

/* The end of the value that begins at p; NULL if it is not plain JSON, or refers to base64. */
static Text value_end(Text p, Text end)
{
    unsigned char open[DEPTH_MAX];
    int depth = 0;
    for (;;) { /* a value begins at p */
        if (p >= end)
            return NULL;
        switch (*p) {
        case '"':
            p++;
            if (is_base64_key(p, end) || (p = string_end(p, end)) == NULL)
                return NULL;
            p++;
            break;
        case '{':
        case '[':
            if (depth == DEPTH_MAX)
                return NULL;
            open[depth++] = *p;
            p = skip_blanks(p + 1, end);
            if (p >= end)
                return NULL;
            if (*p == (open[depth - 1] == '{' ? '}' : ']')) {
                depth--;
                p++;
                break;
            }
            if (open[depth - 1] == '{')
                goto key;
            continue;
        case 't':
            if (end - p < 4 || memcmp(p, "true", 4)) return NULL;
            p += 4;
            break;
        case 'n':
            if (end - p < 4 || memcmp(p, "null", 4)) return NULL;
            p += 4;
            break;
        case 'f':
            if (end - p < 5 || memcmp(p, "false", 5)) return NULL;
            p += 5;
            break;
        default:
            if ((p = number_end(p, end)) == NULL)
                return NULL;
        }
        /* a value has ended: what holds it goes on or ends too */
        for (;;) {
            if (depth == 0)
                return p;
            p = skip_blanks(p, end);
            if (p >= end)
                return NULL;
            if (*p == (open[depth - 1] == '{' ? '}' : ']')) {
                depth--;
                p++;
                continue;
            }
            if (*p != ',')
                return NULL;
            p = skip_blanks(p + 1, end);
            break;
        }
        if (open[depth - 1] == '[')
            continue;
    key:
        if (p >= end || *p != '"')
            return NULL;
        p++;
        if (is_base64_key(p, end) || (p = string_end(p, end)) == NULL)
            return NULL;
        p = skip_blanks(p + 1, end);
        if (p >= end || *p != ':')
            return NULL;
        p = skip_blanks(p + 1, end);
    }
}

/* ------------------------------------------------------------------ UTF-8 */

static int is_ascii(Text p, Py_ssize_t size)
{
    Text end = p + size;
#if defined(__SSE2__)
    while (end - p >= 16) {
        if (_mm_movemask_epi8(_mm_loadu_si128((const __m128i *)p)))
            return 0;
        p += 16;
    }
#endif
    while (p < end)
        if (*p++ & 0x80)
            return 0;
    return 1;
}

/* Whether text is UTF-8 (RFC 3629): no overlong forms, no surrogates, nothing above U+10FFFF. */
static int is_utf8(Text p, Py_ssize_t size)
{
    Text end = p + size;
    while (p < end) {
        unsigned c = *p;
        if (c < 0x80) {
            p++;
        } else if (c >= 0xC2 && c <= 0xDF) {
            if (end - p < 2 || (p[1] & 0xC0) != 0x80) return 0;
            p += 2;
        } else if (c >= 0xE0 && c <= 0xEF) {
            if (end - p < 3 || (p[1] & 0xC0) != 0x80 || (p[2] & 0xC0) != 0x80) return 0;
            if ((c == 0xE0 && p[1] < 0xA0) || (c == 0xED && p[1] > 0x9F)) return 0;
            p += 3;
        } else if (c >= 0xF0 && c <= 0xF4) {
            if (end - p < 4 || (p[1] & 0xC0) != 0x80 || (p[2] & 0xC0) != 0x80 || (p[3] & 0xC0) != 0x80) return 0;
            if ((c == 0xF0 && p[1] < 0x90) || (c == 0xF4 && p[1] > 0x8F)) return 0;
            p += 4;
        } else {
            return 0;
        }
    }
    return 1;
}

/* Unmask (RFC 6455, section 5.3); whether it is all ASCII, which costs nothing on the way. */
static int unmask(unsigned char *to, Text from, Py_ssize_t size, Text mask)
{
    uint32_t one;
    memcpy(&one, mask, 4);
    uint64_t two = (uint64_t)one << 32 | one, seen = 0;
    Py_ssize_t at = 0;
#if defined(__SSE2__)
    const __m128i four = _mm_set1_epi32((int)one);
    __m128i all = _mm_setzero_si128();
    for (; size - at >= 16; at += 16) {
        __m128i plain = _mm_xor_si128(_mm_loadu_si128((const __m128i *)(from + at)), four);
        _mm_storeu_si128((__m128i *)(to + at), plain);
        all = _mm_or_si128(all, plain);
    }
    seen = _mm_movemask_epi8(all) ? 0x80 : 0;
#endif
    for (; size - at >= 8; at += 8) {
        uint64_t word;
        memcpy(&word, from + at, 8);
        word ^= two;
        memcpy(to + at, &word, 8);
        seen |= word;
    }
    for (; at < size; at++)
        seen |= to[at] = from[at] ^ mask[at & 3];
    return !(seen & 0x8080808080808080);
}

/* ------------------------------------------------------------------ what is known of Python's objects */

PyTypeObject *asked_type, *answered_type, *body_type, *call_type, *end_type, *attempt_type, *request_type, *options_type,
    *session_type;
PyObject *ended_ok;
Py_ssize_t body_raw, body_attachments, attempt_id, attempt_request, attempt_mark, request_options, options_timeout,
    options_meta, options_idempotent, options_key, options_idle, session_link;

static PyTypeObject *reply_meta_type, *outbox_type, *marks_type, *socket_type, *limits_type, *peer_type, *loop_type,
    *link_counters_type, *parser_type;
static PyObject *get_buffer_method, *buffer_updated_method; /* SocketLink's own */

/* Where the slots are; the names of the fields beside them, in `know` and `know_outbox`. */
static Py_ssize_t call_attempt, call_endpoint, call_method, call_body, call_left, end_wire_id, end_outcome, end_body, end_meta,
    options_trace, options_progress, options_stream_in, options_stream_out, meta_worker, meta_attempts, meta_elapsed,
    meta_retryable, meta_trace, meta_timing, meta_repeated, outbox_state, outbox_enqueued, outbox_flushed, outbox_hard,
    outbox_congested, outbox_pieces, outbox_dirty, outbox_counted, outbox_limits, limits_hard, socket_blocked, socket_fd,
    socket_transport, socket_turn, marks_dirty, marks_scheduled, peer_writer, peer_held, peer_batched, peer_feeding,
    peer_decoded, marks_loop, marks_counters, marks_flush_link, counters_writes, counters_bytes_out, link_reader, link_links,
    link_parser, link_begun, link_no_more, link_receiver, link_heard, socket_rest_size, loop_buffer, loop_whole_room, loop_counters, counters_bytes_in, counters_frames_in, parser_rest, parser_need,
    parser_opcode, parser_ended, parser_more;

int find_slots(const Slot *slots, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        PyObject *found = PyObject_GetAttrString((PyObject *)*slots[i].type, slots[i].name);
        if (found == NULL)
            return -1;
        int good = Py_TYPE(found) == &PyMemberDescr_Type && ((PyMemberDescrObject *)found)->d_member->type == T_OBJECT_EX
                   && PyType_IsSubtype(*slots[i].type, PyDescr_TYPE(found));
        if (good)
            *slots[i].offset = ((PyMemberDescrObject *)found)->d_member->offset;
        Py_DECREF(found);
        if (!good) {
            PyErr_Format(PyExc_ImportError, "%s of %s stands in no slot", slots[i].name, (*slots[i].type)->tp_name);
            return -1;
        }
    }
    return 0;
}

int bump(PyObject *object, Py_ssize_t offset, Py_ssize_t by)
{
    PyObject *before = at(object, offset), *after;
    long long value = before == NULL ? -1 : PyLong_AsLongLong(before);
    if (value == -1 && (before == NULL || PyErr_Occurred())) {
        if (before == NULL)
            PyErr_SetString(PyExc_AttributeError, "a count is missing");
        return -1;
    }
    if ((after = PyLong_FromLongLong(value + by)) == NULL)
        return -1;
    put(object, offset, after);
    Py_DECREF(after);
    return 0;
}

/* ------------------------------------------------------------------ Reader */

typedef struct {
    PyObject_HEAD
    PyObject *session;  /* whose events these are; NULL: payloads are handed on as they are */
    PyObject *prefix;   /* bytes: what ids of this peer's attempts begin with, the quote included */
    PyObject *routes;   /* dict: methods as written that were found good -> (endpoint, method) */
    PyObject *defaults; /* the options of a call that names none */
    PyObject *last;     /* bytes: the method of the last call, and its route */
    PyObject *route;
    Py_ssize_t size_max;
    Py_ssize_t events_max;
    Py_ssize_t decoded_bytes; /* payloads of the events that were made of messages, for who counts them */
    char masked;
    char reading;
} Reader;

static int Reader_init(Reader *self, PyObject *args, PyObject *named)
{
    static char *names[] = {"masked", "message_max_bytes", "events_max", NULL};
    int masked;
    Py_ssize_t size_max, events_max;
    if (!PyArg_ParseTupleAndKeywords(args, named, "pnn", names, &masked, &size_max, &events_max))
        return -1;
    self->masked = (char)masked;
    self->size_max = size_max < PY_SSIZE_T_MAX / 4 ? size_max : PY_SSIZE_T_MAX / 4;
    self->events_max = events_max;
    return 0;
}

static int Reader_traverse(Reader *self, visitproc visit, void *arg)
{
    Py_VISIT(self->session);
    Py_VISIT(self->routes);
    Py_VISIT(self->defaults);
    Py_VISIT(self->route);
    return 0;
}

static int Reader_clear(Reader *self)
{
    Py_CLEAR(self->session);
    Py_CLEAR(self->routes);
    Py_CLEAR(self->defaults);
    Py_CLEAR(self->last);
    Py_CLEAR(self->route);
    return 0;
}

static void Reader_dealloc(Reader *self)
{
    PyObject_GC_UnTrack(self);
    Reader_clear(self);
    Py_CLEAR(self->prefix);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyObject *Reader_decode_for(Reader *self, PyObject *const *args, Py_ssize_t count)
{
    if (count != 4 || !PyBytes_Check(args[1]) || !PyDict_CheckExact(args[2]) || !is(args[3], options_type)) {
        PyErr_SetString(PyExc_TypeError, "decode_for(session, prefix: bytes, routes: dict, defaults: Options)");
        return NULL;
    }
    if (self->reading) {
        PyErr_SetString(PyExc_RuntimeError, "decode_for from within read");
        return NULL;
    }
    Reader_clear(self);
    Py_XSETREF(self->prefix, Py_NewRef(args[1]));
    self->session = Py_NewRef(args[0]);
    self->routes = Py_NewRef(args[2]);
    self->defaults = Py_NewRef(args[3]);
    Py_RETURN_NONE;
}

/* The route of a method, borrowed; NULL if it has none yet, with an error only if memory is short. */
static PyObject *route_of(Reader *self, Text method, Py_ssize_t size)
{
    if (self->last && PyBytes_GET_SIZE(self->last) == size && !memcmp(PyBytes_AS_STRING(self->last), method, size))
        return self->route;
    for (Py_ssize_t i = 0; i < size; i++) /* names are plain ASCII: what is more has no route */
        if (method[i] >= 0x80 || method[i] == '\\')
            return NULL;
    PyObject *name = PyUnicode_DecodeASCII((const char *)method, size, NULL);
    if (name == NULL)
        return NULL;
    PyObject *route = PyDict_GetItemWithError(self->routes, name);
    Py_DECREF(name);
    if (route == NULL || !PyTuple_CheckExact(route) || PyTuple_GET_SIZE(route) != 2)
        return NULL;
    Py_INCREF(route);
    PyObject *last = PyBytes_FromStringAndSize((const char *)method, size);
    if (last == NULL) {
        Py_DECREF(route);
        return NULL;
    }
    Py_XSETREF(self->last, last);
    Py_XSETREF(self->route, route);
    return route;
}

/* The options of a call whose meta is {"timeout": number}, a new reference; NULL if it is not just that. */
static PyObject *options_of(Reader *self, Text p, Text end)
{
    static const char name[] = "\"timeout\"";
    char digits[32];
    PyObject *defaults = self->defaults;
    if (at(defaults, options_idempotent) != Py_False || at(defaults, options_key) != Py_None)
        return NULL; /* they go with other options, by the rules */
    p = skip_blanks(p + 1, end); /* p was at { */
    if (end - p < (Py_ssize_t)sizeof(name) - 1 || memcmp(p, name, sizeof(name) - 1))
        return NULL;
    p = skip_blanks(p + sizeof(name) - 1, end);
    if (p >= end || *p != ':')
        return NULL;
    p = skip_blanks(p + 1, end);
    Text number = p;
    if ((p = number_end(p, end)) == NULL || p - number > DIGITS_MAX || skip_blanks(p, end) != end - 1 || end[-1] != '}')
        return NULL;
    memcpy(digits, number, p - number);
    digits[p - number] = 0;
    double seconds = PyOS_string_to_double(digits, NULL, NULL);
    if (seconds == -1.0 && PyErr_Occurred())
        PyErr_Clear();
    if (!(seconds > 0 && seconds < 1e9))
        return NULL;
    PyObject *timeout = PyFloat_FromDouble(seconds), *options = NULL;
    if (timeout) {
        static PyObject *copy;
        if (copy != NULL || (copy = PyUnicode_InternFromString("__copy__")) != NULL)
            options = PyObject_CallMethodNoArgs(defaults, copy);
        if (options) { /* nobody has seen it yet: as good as made so */
            if (is(options, options_type)) {
                put(options, options_timeout, timeout);
                put(options, options_meta, Py_True);
            } else {
                Py_CLEAR(options);
            }
        }
        Py_DECREF(timeout);
    }
    return options;
}

/* A payload of JSON text that is copied out of p. */
static PyObject *new_body(Text p, Text end)
{
    PyObject *raw = PyBytes_FromStringAndSize((const char *)p, end - p), *body = NULL;
    if (raw) {
        body = PyObject_Vectorcall((PyObject *)body_type, &raw, 1, NULL);
        Py_DECREF(raw);
    }
    return body;
}

/* The members of a message, each from its first byte to behind its last; NULL for those it has not. */
typedef struct {
    Text id, id_end, method, method_end, params, params_end, result, result_end, meta, meta_end;
} Members;

/* Find them in a text; 0 if it is not plain. */
static int find_members(Text p, Text end, Members *m)
{
    int version = 0;
    if (p >= end || *p++ != '{')
        return 0;
    p = skip_blanks(p, end);
    for (;;) {
        if (p >= end || *p++ != '"')
            return 0;
        Text name = p;
        while (p < end && *p != '"' && *p != '\\') p++;
        if (p >= end || *p != '"')
            return 0;
        Py_ssize_t size = p - name;
        p = skip_blanks(p + 1, end);
        if (p >= end || *p != ':')
            return 0;
        p = skip_blanks(p + 1, end);
        if (size == 2 && !memcmp(name, "id", 2)) {
            if (m->id || p >= end) return 0;
            m->id = p;
            if (*p == '"') {
                if ((p = string_end(p + 1, end)) == NULL) return 0;
                p++;
                if (p - m->id > ID_MAX + 2 || memchr(m->id, '\\', p - m->id)) return 0;
            } else {
                while (p < end && *p >= '0' && *p <= '9') p++;
                if (p == m->id || p - m->id > DIGITS_MAX || (*m->id == '0' && p - m->id > 1)) return 0;
            }
            m->id_end = p;
        } else if (size == 6 && !memcmp(name, "method", 6)) {
            if (m->method || p >= end || *p != '"') return 0;
            m->method = ++p;
            if ((p = string_end(p, end)) == NULL) return 0;
            m->method_end = p++;
        } else if (size == 6 && !memcmp(name, "params", 6)) {
            if (m->params) return 0;
            m->params = p;
            if ((p = value_end(p, end)) == NULL) return 0;
            m->params_end = p;
        } else if (size == 6 && !memcmp(name, "result", 6)) {
            if (m->result) return 0;
            m->result = p;
            if ((p = value_end(p, end)) == NULL) return 0;
            m->result_end = p;
        } else if (size == 7 && !memcmp(name, "jsonrpc", 7)) {
            if (version || end - p < 5 || memcmp(p, "\"2.0\"", 5)) return 0;
            version = 1;
            p += 5;
        } else if (size == 4 && !memcmp(name, "meta", 4)) {
            if (m->meta || p >= end || *p != '{') return 0;
            m->meta = p;
            if ((p = value_end(p, end)) == NULL) return 0;
            m->meta_end = p;
        } else {
            return 0;
        }
        p = skip_blanks(p, end);
        if (p >= end)
            return 0;
        if (*p == '}')
            break;
        if (*p++ != ',')
            return 0;
        p = skip_blanks(p, end);
    }
    return skip_blanks(p + 1, end) == end && version && m->id;
}

/* A plain call or reply as an event. NULL if it is none, with an error only if memory is short. */
static PyObject *decode(Reader *self, Text p, Text end)
{
    Members m = {0};
    if (!find_members(p, end, &m))
        return NULL;
    PyObject *event = NULL;
    if (m.method) {
        PyObject *route;
        if (!m.params || m.result || (route = route_of(self, m.method, m.method_end - m.method)) == NULL)
            return NULL;
        PyObject *options = m.meta ? options_of(self, m.meta, m.meta_end) : Py_NewRef(self->defaults);
        if (options == NULL)
            return NULL;
        PyObject *wire_id = PyBytes_FromStringAndSize((const char *)m.id, m.id_end - m.id),
                 *body = new_body(m.params, m.params_end);
        if (wire_id && body) {
            PyObject *values[6] = {self->session, wire_id, PyTuple_GET_ITEM(route, 0), PyTuple_GET_ITEM(route, 1), body,
                                   options};
            event = PyObject_Vectorcall((PyObject *)asked_type, values, 6, NULL);
        }
        Py_XDECREF(wire_id);
        Py_XDECREF(body);
        Py_DECREF(options);
    } else if (m.result && !m.params && !m.meta) {
        Py_ssize_t head = PyBytes_GET_SIZE(self->prefix);
        if (m.id_end - m.id < head + 2 || memcmp(m.id, PyBytes_AS_STRING(self->prefix), head))
            return NULL;
        unsigned long long number = 0;
        Text digit = m.id + head;
        if (m.id_end - 1 - digit > DIGITS_MAX)
            return NULL;
        for (; digit < m.id_end - 1; digit++) {
            if (*digit < '0' || *digit > '9') return NULL;
            number = number * 10 + (*digit - '0');
        }
        PyObject *attempt = PyLong_FromUnsignedLongLong(number), *body = new_body(m.result, m.result_end);
        if (attempt && body) {
            PyObject *values[3] = {self->session, attempt, body};
            event = PyObject_Vectorcall((PyObject *)answered_type, values, 3, NULL);
        }
        Py_XDECREF(attempt);
        Py_XDECREF(body);
    }
    return event;
}

/* Where a plain frame's payload is. */
typedef struct {
    Py_ssize_t start; /* bytes before it */
    Py_ssize_t size;
} Frame;

/* Look at the header of a plain frame of which `there` bytes are there: a whole message, text or binary, within the
   bound. 0 if it is none, or the header is not whole. */
static int find_frame(const Reader *self, Text head, Py_ssize_t there, Frame *frame)
{
    if (there < 2 || (head[0] != 0x81 && head[0] != 0x82) || (head[1] & 0x80) != (self->masked ? 0x80 : 0))
        return 0;
    frame->start = self->masked ? 6 : 2;
    frame->size = head[1] & 0x7F;
    if (frame->size == 126) {
        if (there < 4)
            return 0;
        frame->size = head[2] << 8 | head[3];
        frame->start += 2;
        if (frame->size < 126)
            return 0;
    } else if (frame->size == 127) {
        if (there < 10)
            return 0;
        uint64_t size = 0;
        for (int i = 2; i < 10; i++) size = size << 8 | head[i];
        if (size < 65536 || size > (uint64_t)PY_SSIZE_T_MAX / 4)
            return 0;
        frame->size = (Py_ssize_t)size;
        frame->start += 8;
    }
    return frame->size <= self->size_max && there >= frame->start;
}

/* The event of a whole plain frame, unmasked into `plain`; NULL without an error if it is not right after all. */
static PyObject *read_frame(Reader *self, int opcode, Text payload, Py_ssize_t size, unsigned char *plain)
{
    int ascii = self->masked ? unmask(plain, payload, size, payload - 4) : opcode != 1 || is_ascii(plain, size);
    if (opcode == 1 && !ascii && !is_utf8(plain, size))
        return NULL;
    if (opcode == 1 && self->session) {
        PyObject *event = decode(self, plain, plain + size);
        if (event || PyErr_Occurred()) {
            self->decoded_bytes += size;
            return event;
        }
    }
    PyObject *text = PyBytes_FromStringAndSize((const char *)plain, size), *number = PyLong_FromLong(opcode), *event = NULL;
    if (text && number)
        event = PyTuple_Pack(2, number, text);
    Py_XDECREF(text);
    Py_XDECREF(number);
    return event;
}

/* The arguments (data, position, stop) of a method; the view must be released. */
static int read_arguments(PyObject *const *args, Py_buffer *view, Py_ssize_t *position, Py_ssize_t *stop)
{
    *position = PyLong_AsSsize_t(args[1]);
    if (*position == -1 && PyErr_Occurred())
        return -1;
    *stop = PyLong_AsSsize_t(args[2]);
    if (*stop == -1 && PyErr_Occurred())
        return -1;
    if (PyObject_GetBuffer(args[0], view, PyBUF_SIMPLE) < 0)
        return -1;
    if (*position < 0 || *position > *stop || *stop > view->len) {
        PyBuffer_Release(view);
        PyErr_SetString(PyExc_ValueError, "position and stop are not within the data");
        return -1;
    }
    return 0;
}

/* Take whole plain frames from data[position:stop]; the position behind the last, -1 with an error.

   Data that may be written to is unmasked where it stands, and masked again if a frame is left to Python. Data that may
   not would have to be copied out of the receive buffer first: 0.4 µs more for a frame of 16 KiB, nothing at 200 bytes. */
static Py_ssize_t read_frames(Reader *self, const Py_buffer *view, Py_ssize_t position, Py_ssize_t stop, PyObject *events)
{
    Text data = view->buf;
    unsigned char *scratch = NULL;
    Py_ssize_t room = 0;
    Frame frame;
    self->reading = 1;
    while (PyList_GET_SIZE(events) < self->events_max && find_frame(self, data + position, stop - position, &frame)
           && stop - position - frame.start >= frame.size) {
        Text payload = data + position + frame.start;
        unsigned char *plain = (unsigned char *)payload;
        if (self->masked && view->readonly) {
            if (room < frame.size) {
                PyMem_Free(scratch);
                room = frame.size < 4096 ? 4096 : frame.size;
                scratch = PyMem_Malloc((size_t)room);
                if (scratch == NULL) {
                    PyErr_NoMemory();
                    break;
                }
            }
            plain = scratch;
        }
        PyObject *event = read_frame(self, data[position] & 0x0F, payload, frame.size, plain);
        if (event == NULL) {
            if (self->masked && !view->readonly)
                unmask(plain, plain, frame.size, payload - 4);
            break;
        }
        int added = PyList_Append(events, event);
        Py_DECREF(event);
        if (added < 0)
            break;
        position += frame.start + frame.size;
    }
    PyMem_Free(scratch);
    self->reading = 0;
    return PyErr_Occurred() ? -1 : position;
}

/* read(data, position, stop, events) -> position */
static PyObject *Reader_read(Reader *self, PyObject *const *args, Py_ssize_t count)
{
    Py_buffer view;
    Py_ssize_t position, stop;
    if (count != 4 || !PyList_CheckExact(args[3])) {
        PyErr_SetString(PyExc_TypeError, "read(data, position: int, stop: int, events: list)");
        return NULL;
    }
    if (self->reading) {
        PyErr_SetString(PyExc_RuntimeError, "read from within read");
        return NULL;
    }
    if (read_arguments(args, &view, &position, &stop) < 0)
        return NULL;
    position = read_frames(self, &view, position, stop, args[3]);
    PyBuffer_Release(&view);
    return position < 0 ? NULL : PyLong_FromSsize_t(position);
}

/* begins(data, position, stop, bytes) -> bool: whether what is there begins a plain frame of at most so many bytes, and is
   right so far. */
static PyObject *Reader_begins(Reader *self, PyObject *const *args, Py_ssize_t count)
{
    Py_buffer view;
    Py_ssize_t position, stop, bytes;
    if (count != 4) {
        PyErr_SetString(PyExc_TypeError, "begins(data, position: int, stop: int, bytes: int)");
        return NULL;
    }
    bytes = PyLong_AsSsize_t(args[3]);
    if ((bytes == -1 && PyErr_Occurred()) || read_arguments(args, &view, &position, &stop) < 0)
        return NULL;
    Text head = (Text)view.buf + position;
    Frame frame;
    int good = find_frame(self, head, stop - position, &frame) && frame.start + frame.size <= bytes
               && stop - position - frame.start < frame.size;
    if (good && head[0] == 0x81) { /* wrong text is refused as soon as it is there (RFC 6455, section 8.1) */
        unsigned char plain[1024]; /* a multiple of the mask */
        Text p = head + frame.start, mask = p - 4, end = (Text)view.buf + stop;
        while (good && p < end) {
            Py_ssize_t size = end - p < (Py_ssize_t)sizeof(plain) ? end - p : (Py_ssize_t)sizeof(plain);
            good = self->masked ? unmask(plain, p, size, mask) : is_ascii(p, size);
            p += size;
        }
    }
    PyBuffer_Release(&view);
    return PyBool_FromLong(good);
}

static PyMethodDef Reader_methods[] = {
    {"decode_for", (PyCFunction)(void (*)(void))Reader_decode_for, METH_FASTCALL,
     "decode_for(session, prefix, routes, defaults)\n--\n\nMake events of plain calls and replies from now on."},
    {"read", (PyCFunction)(void (*)(void))Reader_read, METH_FASTCALL,
     "read(data, position, stop, events)\n--\n\nTake whole plain frames out of data; the position after the last. Data "
     "that may be written to is used up."},
    {"begins", (PyCFunction)(void (*)(void))Reader_begins, METH_FASTCALL,
     "begins(data, position, stop, bytes)\n--\n\nWhether a plain frame of at most so many bytes begins there."},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef Reader_members[] = {
    {"decoded_bytes", T_PYSSIZET, offsetof(Reader, decoded_bytes), 0, "payloads of the messages that became events"},
    {NULL, 0, 0, 0, NULL},
};

static PyTypeObject ReaderType = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "broker.wire._native.Reader",
    .tp_doc = "Reader(masked, message_max_bytes, events_max)\n--\n\nReads the plain frames of one link.",
    .tp_basicsize = sizeof(Reader),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .tp_new = PyType_GenericNew,
    .tp_init = (initproc)Reader_init,
    .tp_dealloc = (destructor)Reader_dealloc,
    .tp_traverse = (traverseproc)Reader_traverse,
    .tp_clear = (inquiry)Reader_clear,
    .tp_methods = Reader_methods,
    .tp_members = Reader_members,
};

/* ------------------------------------------------------------------ Writer */

typedef struct {
    PyObject_HEAD
    PyObject *prefix;   /* bytes: {"jsonrpc":"2.0","id":"<ours> */
    PyObject *endpoint; /* str: what the link is attached to */
    PyObject *outbox;   /* the link */
    PyObject *marks;    /* what is told, by its method mark, that it has something to write */
    Py_ssize_t soft;    /* bytes that wait, above which calls are held */
    char meta;          /* whether calls say what is left of their time */
} Writer;

static PyObject *Writer_new(PyTypeObject *type, PyObject *args, PyObject *named)
{
    static char *names[] = {"prefix", "endpoint", "outbox", "marks", "soft_bytes", "meta", NULL};
    PyObject *prefix, *endpoint, *outbox, *marks;
    Py_ssize_t soft;
    int meta;
    if (outbox_type == NULL) {
        PyErr_SetString(PyExc_RuntimeError, "know_outbox comes first");
        return NULL;
    }
    if (!PyArg_ParseTupleAndKeywords(args, named, "SUO!Onp", names, &prefix, &endpoint, outbox_type, &outbox, &marks, &soft,
                                     &meta))
        return NULL;
    Writer *self = (Writer *)type->tp_alloc(type, 0);
    if (self) {
        self->prefix = Py_NewRef(prefix);
        self->endpoint = Py_NewRef(endpoint);
        self->outbox = Py_NewRef(outbox);
        self->marks = Py_NewRef(marks);
        self->soft = soft;
        self->meta = (char)meta;
    }
    return (PyObject *)self;
}

static int Writer_traverse(Writer *self, visitproc visit, void *arg)
{
    Py_VISIT(self->outbox);
    Py_VISIT(self->marks);
    return 0;
}

static int Writer_clear(Writer *self)
{
    Py_CLEAR(self->outbox);
    Py_CLEAR(self->marks);
    return 0;
}

static void Writer_dealloc(Writer *self)
{
    PyObject_GC_UnTrack(self);
    Writer_clear(self);
    Py_CLEAR(self->prefix);
    Py_CLEAR(self->endpoint);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

/* Text that is put together from pieces: they are listed first, then copied once. */
#define PIECES_MAX 24

typedef struct {
    const void *from[PIECES_MAX];
    Py_ssize_t size[PIECES_MAX];
    int count;
    int body; /* which of them is the payload */
    Py_ssize_t total;
    char numbers[96]; /* text of numbers stands here */
    int used;
} Pieces;

static inline void add(Pieces *pieces, const void *from, Py_ssize_t size)
{
    pieces->from[pieces->count] = from;
    pieces->size[pieces->count++] = size;
    pieces->total += size;
}

#define ADD_TEXT(pieces, text) add(pieces, text, (Py_ssize_t)sizeof(text) - 1)

static void add_number(Pieces *pieces, unsigned long long number)
{
    int end = pieces->used += 20, begin = end; /* 2**64 has 20 digits */
    do pieces->numbers[--begin] = (char)('0' + number % 10); while (number /= 10);
    add(pieces, pieces->numbers + begin, end - begin);
}

/* Text of a float, as `format` and `precision` of PyOS_double_to_string; 0 if it is not plain, or memory is short. */
static int add_float(Pieces *pieces, double number, char format, int precision)
{
    if (!(number >= 0.0005 && number < 1e9))
        return 0; /* JSON's writers differ in exponents */
    char *text = PyOS_double_to_string(number, format, precision, Py_DTSF_ADD_DOT_0, NULL);
    if (text == NULL)
        return 0;
    size_t size = strlen(text);
    if (format == 'f') /* as round() leaves it: no zero at the end but the one behind the point */
        while (size > 2 && text[size - 1] == '0' && text[size - 2] != '.') size--;
    int fits = size <= 24;
    if (fits) {
        memcpy(pieces->numbers + pieces->used, text, size);
        add(pieces, pieces->numbers + pieces->used, (Py_ssize_t)size);
        pieces->used += 24;
    }
    PyMem_Free(text);
    return fits;
}

/* Some pieces as bytes, with so much room before them. */
static PyObject *join(const Pieces *pieces, int first, int end, Py_ssize_t head)
{
    Py_ssize_t size = head;
    for (int i = first; i < end; i++) size += pieces->size[i];
    PyObject *joined = PyBytes_FromStringAndSize(NULL, size);
    if (joined) {
        char *p = PyBytes_AS_STRING(joined) + head;
        for (int i = first; i < end; i++) {
            memcpy(p, pieces->from[i], (size_t)pieces->size[i]);
            p += pieces->size[i];
        }
    }
    return joined;
}

/* What goes into the outbox for one message: a whole frame, or one of which the payload is not copied. */
typedef struct {
    PyObject *parts[3];
    int count;
    Py_ssize_t size;
} Made;

static void drop(Made *made)
{
    while (made->count) {
        made->count--; /* not within the macro, which reads its argument twice */
        Py_CLEAR(made->parts[made->count]);
    }
}

/* Make a view of a part, in the outbox the mark of what is within a frame; 0 with an error. */
static int add_view(Made *made, PyObject *part)
{
    PyObject *view = part ? PyMemoryView_FromObject(part) : NULL;
    if (view == NULL)
        return 0;
    made->parts[made->count++] = view;
    return 1;
}

/* The pieces as a whole frame (RFC 6455, section 5.2) around a payload; nothing, without an error if it is too large. */
static void frame_of(const Pieces *pieces, PyObject *raw, Made *made)
{
    Py_ssize_t size = pieces->total, head = size < 126 ? 2 : 4;
    int copied = pieces->size[pieces->body] <= COPIED_MAX;
    if (size > UNSPLIT_MAX - 4)
        return;
    PyObject *first = join(pieces, 0, copied ? pieces->count : pieces->body, head);
    if (first == NULL)
        return;
    unsigned char *p = (unsigned char *)PyBytes_AS_STRING(first);
    p[0] = 0x81;
    p[1] = (unsigned char)(size < 126 ? size : 126);
    if (head == 4) {
        p[2] = (unsigned char)(size >> 8);
        p[3] = (unsigned char)size;
    }
    made->parts[made->count++] = first;
    made->size = head + size;
    if (!copied) {
        PyObject *last = join(pieces, pieces->body + 1, pieces->count, 0);
        if (!add_view(made, raw) || !add_view(made, last))
            drop(made);
        Py_XDECREF(last);
    }
}

/* What a body holds as JSON text, if it has no attachments and is small; 0 if not. The view must be released. */
static int body_text(PyObject *body, Py_buffer *view)
{
    if (!is(body, body_type))
        return 0;
    PyObject *attachments = at(body, body_attachments), *raw = at(body, body_raw);
    if (attachments == NULL || !PyTuple_CheckExact(attachments) || PyTuple_GET_SIZE(attachments) || raw == NULL)
        return 0;
    if (PyObject_GetBuffer(raw, view, PyBUF_SIMPLE) < 0) {
        PyErr_Clear();
        return 0;
    }
    if (view->len > 0 && view->len <= SMALL_MAX)
        return 1;
    PyBuffer_Release(view);
    return 0;
}

/* What `meta` of a call says: its number in the session, what is left of its time, whether parts are wanted. */
static int add_call_meta(Pieces *pieces, PyObject *attempt, double left_s, unsigned long long n, int tells)
{
    if (!n && !tells)
        return 1;
    ADD_TEXT(pieces, ",\"meta\":{");
    if (n) {
        ADD_TEXT(pieces, "\"n\":");
        add_number(pieces, n);
    }
    if (tells) {
        PyObject *request = at(attempt, attempt_request), *options;
        if (!is(request, request_type) || !is(options = at(request, request_options), options_type)
            || at(options, options_trace) != Py_None
            || at(options, options_idempotent) != Py_False || at(options, options_progress) != Py_None
            || at(options, options_idle) != Py_None || at(options, options_stream_out) != Py_False)
            return 0;
        if (n)
            ADD_TEXT(pieces, ",");
        ADD_TEXT(pieces, "\"timeout\":");
        if (!add_float(pieces, left_s, 'f', 3))
            return 0;
        if (at(options, options_stream_in) == Py_True)
            ADD_TEXT(pieces, ",\"stream\":\"in\"");
    }
    ADD_TEXT(pieces, "}");
    return 1;
}

/* What a call says. */
typedef struct {
    PyObject *attempt, *endpoint, *method, *body;
    double left_s;
} Called;

/* The frame of a plain call; nothing, without an error, if it is not plain. */
static void call_frame(Writer *self, const Called *call, unsigned long long n, Made *made)
{
    PyObject *attempt = call->attempt, *method = call->method, *endpoint = call->endpoint;
    Py_buffer raw;
    if (!is(attempt, attempt_type) || method == NULL || !PyUnicode_CheckExact(method) || !PyUnicode_IS_COMPACT_ASCII(method)
        || endpoint == NULL || !PyUnicode_CheckExact(endpoint) || !PyUnicode_IS_COMPACT_ASCII(endpoint))
        return;
    Py_ssize_t id = count_at(attempt, attempt_id);
    if (id < 0 || !body_text(call->body, &raw))
        return;
    Pieces pieces = {.count = 0};
    add(&pieces, PyBytes_AS_STRING(self->prefix), PyBytes_GET_SIZE(self->prefix));
    add_number(&pieces, (unsigned long long)id);
    ADD_TEXT(&pieces, "\",\"method\":\"");
    if (endpoint != self->endpoint && PyUnicode_Compare(endpoint, self->endpoint)) {
        add(&pieces, PyUnicode_1BYTE_DATA(endpoint), PyUnicode_GET_LENGTH(endpoint));
        ADD_TEXT(&pieces, "/");
    }
    add(&pieces, PyUnicode_1BYTE_DATA(method), PyUnicode_GET_LENGTH(method));
    ADD_TEXT(&pieces, "\",\"params\":");
    pieces.body = pieces.count;
    add(&pieces, raw.buf, raw.len);
    if (add_call_meta(&pieces, attempt, call->left_s, n, self->meta)) {
        ADD_TEXT(&pieces, "}");
        frame_of(&pieces, raw.obj, made);
    }
    PyBuffer_Release(&raw);
}

/* What `meta` of a reply says: its number in the session, and how it came about. */
static int add_end_meta(Pieces *pieces, PyObject *meta, unsigned long long n)
{
    if (!n && meta == Py_None)
        return 1;
    ADD_TEXT(pieces, ",\"meta\":{");
    if (n) {
        ADD_TEXT(pieces, "\"n\":");
        add_number(pieces, n);
    }
    if (meta != Py_None) {
        PyObject *worker, *elapsed;
        Py_ssize_t attempts;
        if (!is(meta, reply_meta_type) || (worker = at(meta, meta_worker)) == NULL || !PyUnicode_CheckExact(worker)
            || !PyUnicode_IS_COMPACT_ASCII(worker) || (attempts = count_at(meta, meta_attempts)) < 1
            || (elapsed = at(meta, meta_elapsed)) == NULL || !PyFloat_CheckExact(elapsed)
            || at(meta, meta_retryable) != Py_False || at(meta, meta_trace) != Py_None || at(meta, meta_timing) != Py_None
            || at(meta, meta_repeated) != Py_False)
            return 0;
        Text name = PyUnicode_1BYTE_DATA(worker);
        Py_ssize_t size = PyUnicode_GET_LENGTH(worker);
        for (Py_ssize_t i = 0; i < size; i++)
            if (name[i] < 0x20 || name[i] > 0x7E || name[i] == '"' || name[i] == '\\')
                return 0;
        if (n)
            ADD_TEXT(pieces, ",");
        ADD_TEXT(pieces, "\"worker\":\"");
        add(pieces, name, size);
        ADD_TEXT(pieces, "\",\"attempts\":");
        add_number(pieces, (unsigned long long)attempts);
        ADD_TEXT(pieces, ",\"elapsed_ms\":");
        if (!add_float(pieces, PyFloat_AS_DOUBLE(elapsed), 'r', 0))
            return 0;
    }
    ADD_TEXT(pieces, "}");
    return 1;
}

/* The frame of a plain result; nothing, without an error, if it is not plain. */
static void end_frame(PyObject *wire_id, PyObject *body, PyObject *meta, unsigned long long n, Made *made)
{
    Py_buffer raw;
    if (wire_id == NULL || !PyBytes_CheckExact(wire_id) || meta == NULL || !body_text(body, &raw))
        return;
    Pieces pieces = {.count = 0};
    ADD_TEXT(&pieces, "{\"jsonrpc\":\"2.0\",\"id\":");
    add(&pieces, PyBytes_AS_STRING(wire_id), PyBytes_GET_SIZE(wire_id));
    ADD_TEXT(&pieces, ",\"result\":");
    pieces.body = pieces.count;
    add(&pieces, raw.buf, raw.len);
    if (add_end_meta(&pieces, meta, n)) {
        ADD_TEXT(&pieces, "}");
        frame_of(&pieces, raw.obj, made);
    }
    PyBuffer_Release(&raw);
}

/* Have the loop call links.link's Writer._flush at the end of this turn; -1 with an error. */
static int schedule(PyObject *marks)
{
    static PyObject *call_soon, *flush_name;
    PyObject *loop = at(marks, marks_loop), *flush_all, *handle = NULL;
    if ((call_soon == NULL && (call_soon = PyUnicode_InternFromString("call_soon")) == NULL)
        || (flush_name == NULL && (flush_name = PyUnicode_InternFromString("_flush")) == NULL))
        return -1;
    if ((flush_all = PyObject_GetAttr(marks, flush_name)) != NULL)
        handle = PyObject_CallMethodOneArg(loop, call_soon, flush_all);
    Py_XDECREF(flush_all);
    if (handle == NULL)
        return -1;
    Py_DECREF(handle);
    put(marks, marks_scheduled, Py_True);
    return 0;
}

/* Have an outbox flushed in this turn of the loop, as links.link's Writer.mark does; -1 with an error. */
static int mark_dirty(Writer *self)
{
    static PyObject *name;
    PyObject *outbox = self->outbox, *marks = self->marks, *dirty;
    if (at(outbox, outbox_dirty) == Py_True)
        return 0;
    if (is(marks, marks_type) && at(outbox, outbox_dirty) == Py_False && at(marks, marks_scheduled) != NULL && at(marks, marks_loop) != NULL
        && (dirty = at(marks, marks_dirty)) != NULL && PyList_CheckExact(dirty)) {
        if ((at(marks, marks_scheduled) != Py_True && schedule(marks) < 0) || PyList_Append(dirty, outbox) < 0)
            return -1;
        put(outbox, outbox_dirty, Py_True);
        return 0;
    }
    if (name == NULL && (name = PyUnicode_InternFromString("mark")) == NULL)
        return -1;
    PyObject *marked = PyObject_CallMethodOneArg(marks, name, outbox);
    Py_XDECREF(marked);
    return marked ? 0 : -1;
}

/* Put a frame into the outbox, as Link.push does; 0 if that has to look closer, -1 with an error. */
static int push(Writer *self, Made *made, Py_ssize_t enqueued, Py_ssize_t flushed, PyObject *attempt)
{
    PyObject *outbox = self->outbox, *pieces = at(outbox, outbox_pieces);
    Py_ssize_t hard = count_at(outbox, outbox_hard);
    if (hard < 0 || enqueued - flushed + made->size > hard || pieces == NULL || !PyList_CheckExact(pieces))
        return 0;
    PyObject *mark = PyLong_FromSsize_t(enqueued + made->size);
    if (mark == NULL)
        return -1;
    Py_ssize_t before = PyList_GET_SIZE(pieces);
    int failed = 0;
    for (int i = 0; !failed && i < made->count; i++) failed = PyList_Append(pieces, made->parts[i]) < 0;
    if (failed || mark_dirty(self) < 0) { /* as if nothing had been tried: somebody will try again */
        PyObject *type, *error, *trace;
        PyErr_Fetch(&type, &error, &trace);
        PyList_SetSlice(pieces, before, PyList_GET_SIZE(pieces), NULL);
        PyErr_Restore(type, error, trace);
        Py_DECREF(mark);
        return -1;
    }
    put(outbox, outbox_enqueued, mark);
    if (attempt)
        put(attempt, attempt_mark, mark);
    Py_DECREF(mark);
    return 1;
}

/* How much has been put into an outbox that is open, and how much of it is gone; 0 if it is not, or they are no numbers. */
static int books_of(const Writer *self, Py_ssize_t *enqueued, Py_ssize_t *flushed)
{
    PyObject *outbox = self->outbox;
    if (outbox == NULL || count_at(outbox, outbox_state) != 0)
        return 0;
    *enqueued = count_at(outbox, outbox_enqueued);
    *flushed = count_at(outbox, outbox_flushed);
    return *enqueued >= 0 && *flushed >= 0;
}

/* Put what was made into the outbox; 0 if nothing was, or that has to look closer, -1 with an error. */
static int queue(Writer *self, Made *made, Py_ssize_t enqueued, Py_ssize_t flushed, PyObject *attempt)
{
    int pushed = made->count ? push(self, made, enqueued, flushed, attempt) : 0;
    drop(made);
    return pushed >= 0 && PyErr_Occurred() ? -1 : pushed;
}

static int queue_call(Writer *self, const Called *call, unsigned long long n)
{
    Py_ssize_t enqueued, flushed;
    Made made = {.count = 0};
    if (!books_of(self, &enqueued, &flushed) || at(self->outbox, outbox_congested) != Py_False
        || enqueued - flushed > self->soft)
        return 0; /* it may have to be held */
    call_frame(self, call, n, &made);
    return queue(self, &made, enqueued, flushed, call->attempt);
}

static int queue_result(Writer *self, PyObject *wire_id, PyObject *body, PyObject *meta, unsigned long long n)
{
    Py_ssize_t enqueued, flushed;
    Made made = {.count = 0};
    if (!books_of(self, &enqueued, &flushed))
        return 0;
    end_frame(wire_id, body, meta, n, &made);
    return queue(self, &made, enqueued, flushed, NULL);
}

/* write(message, n=0) -> bool: queue a plain call or result, numbered if n is not 0; False if that is left to Python. */
static PyObject *Writer_write(Writer *self, PyObject *const *args, Py_ssize_t count)
{
    if (count < 1 || count > 2 || (count == 2 && !PyLong_CheckExact(args[1]))) {
        PyErr_SetString(PyExc_TypeError, "write(message, n: int = 0)");
        return NULL;
    }
    unsigned long long n = count == 2 ? PyLong_AsUnsignedLongLong(args[1]) : 0;
    if (n == (unsigned long long)-1 && PyErr_Occurred())
        return NULL;
    PyObject *message = args[0], *left;
    int queued = 0;
    if (Py_TYPE(message) == call_type && (left = at(message, call_left)) != NULL && PyFloat_CheckExact(left)) {
        Called call = {.attempt = at(message, call_attempt), .endpoint = at(message, call_endpoint),
                       .method = at(message, call_method), .body = at(message, call_body),
                       .left_s = PyFloat_AS_DOUBLE(left)};
        queued = queue_call(self, &call, n);
    } else if (Py_TYPE(message) == end_type && at(message, end_outcome) == ended_ok) {
        queued = queue_result(self, at(message, end_wire_id), at(message, end_body), at(message, end_meta), n);
    }
    return queued < 0 ? NULL : PyBool_FromLong(queued);
}

static PyMethodDef Writer_methods[] = {
    {"write", (PyCFunction)(void (*)(void))Writer_write, METH_FASTCALL,
     "write(message, n=0)\n--\n\nQueue a plain call or a plain result; False for everything else."},
    {NULL, NULL, 0, NULL},
};

static PyTypeObject WriterType = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "broker.wire._native.Writer",
    .tp_doc = "Writer(prefix, endpoint, outbox, mark, soft_bytes, meta)\n--\n\nWrites the plain messages of one link.",
    .tp_basicsize = sizeof(Writer),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .tp_new = Writer_new,
    .tp_dealloc = (destructor)Writer_dealloc,
    .tp_traverse = (traverseproc)Writer_traverse,
    .tp_clear = (inquiry)Writer_clear,
    .tp_methods = Writer_methods,
};

/* ------------------------------------------------------------------ by session */

/* What writes to a session's link in C, borrowed; NULL if nothing does, or what is between them looks at each message. */
static Writer *writer_of(PyObject *session)
{
    PyObject *peer = is(session, session_type) ? at(session, session_link) : NULL;
    PyObject *writer = is(peer, peer_type) ? at(peer, peer_writer) : NULL;
    return is(writer, &WriterType) ? (Writer *)writer : NULL;
}

/* The same for what the engine has a peer deliver: NULL too where messages may be held, or gathered in a batch. */
static Writer *free_writer_of(PyObject *session)
{
    Writer *writer = writer_of(session);
    if (writer == NULL)
        return NULL;
    PyObject *peer = at(session, session_link), *held = at(peer, peer_held), *batched = at(peer, peer_batched);
    int empty = held != NULL && PyDict_Check(held) && PyDict_GET_SIZE(held) == 0 && at(peer, peer_feeding) == Py_None
                && (batched == Py_None || (batched != NULL && PyDict_CheckExact(batched) && PyDict_GET_SIZE(batched) == 0));
    return empty ? writer : NULL;
}

int deliver_call(PyObject *session, PyObject *attempt, PyObject *endpoint, PyObject *method, PyObject *body, double left_s)
{
    Writer *writer = free_writer_of(session);
    if (writer == NULL)
        return 0;
    Called call = {.attempt = attempt, .endpoint = endpoint, .method = method, .body = body, .left_s = left_s};
    Py_INCREF(writer);
    int queued = queue_call(writer, &call, 0);
    Py_DECREF(writer);
    return queued;
}

int deliver_result(PyObject *session, PyObject *wire_id, PyObject *body, PyObject *meta)
{
    Writer *writer = free_writer_of(session);
    if (writer == NULL)
        return 0;
    Py_INCREF(writer);
    int queued = queue_result(writer, wire_id, body, meta, 0);
    Py_DECREF(writer);
    return queued;
}

#define SHARED_MAX 16394       /* bytes of a frame that stands in one piece: Link.send_frame */

/* Queue the frame of a broadcast as Link.send_frame does; 0 if that has to look closer, -1 with an error. */
static int share(Writer *self, PyObject *frame)
{
    Py_ssize_t enqueued, flushed;
    if (!books_of(self, &enqueued, &flushed) || enqueued - flushed > self->soft)
        return 0;
    Made made = {.parts = {frame}, .count = 1, .size = PyBytes_GET_SIZE(frame)};
    return push(self, &made, enqueued, flushed, NULL);
}

/* spread(frame, sessions) -> list: queue a broadcast at all these sessions whose links are plain; who is left. */
static PyObject *spread(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t count)
{
    if (count != 2 || !PyBytes_CheckExact(args[0]) || !PyTuple_CheckExact(args[1])) {
        PyErr_SetString(PyExc_TypeError, "spread(frame: bytes, sessions: tuple)");
        return NULL;
    }
    PyObject *frame = args[0], *sessions = args[1], *left = PyList_New(0);
    int plain = session_type != NULL && outbox_type != NULL && PyBytes_GET_SIZE(frame) <= SHARED_MAX;
    for (Py_ssize_t i = 0; left != NULL && i < PyTuple_GET_SIZE(sessions); i++) {
        PyObject *session = PyTuple_GET_ITEM(sessions, i);
        Writer *writer = plain ? writer_of(session) : NULL;
        int shared = 0;
        if (writer != NULL) {
            Py_INCREF(writer);
            shared = share(writer, frame);
            Py_DECREF(writer);
        }
        if (shared < 0)
            PyErr_Clear(); /* left to Python, which closes one link if that fails again, and goes on with the others */
        if (shared <= 0 && PyList_Append(left, session) < 0)
            Py_CLEAR(left);
    }
    return left;
}

/* ------------------------------------------------------------------ flush */

#define VECTORS_MAX 64         /* pieces that are written without being joined */
#define JOINED_MAX 16384       /* bytes of several pieces that are joined first: cheaper than a vector of small ones */

/* Give bytes to the kernel, all pieces in one call; -1 if it took none. The GIL is kept: the call never waits, and to get
   it back from another thread may. */
static Py_ssize_t write_pieces(int fd, PyObject *pieces, Py_ssize_t size)
{
    struct iovec vectors[VECTORS_MAX];
    Py_buffer views[VECTORS_MAX];
    Py_ssize_t count = PyList_GET_SIZE(pieces), total = 0, taken = -1;
    int held = 0, seen = 0;
    char joined[JOINED_MAX];
    joined[0] = 0; /* for compilers that do not see that size is above 0 */
    if (count > VECTORS_MAX && size > JOINED_MAX)
        return -1;
    for (; seen < count; seen++) {
        Py_buffer one, *view = size <= JOINED_MAX ? &one : &views[held];
        if (PyObject_GetBuffer(PyList_GET_ITEM(pieces, seen), view, PyBUF_SIMPLE) < 0) {
            PyErr_Clear();
            break;
        }
        if (view->len > size - total) { /* more than the books say: left to Python */
            PyBuffer_Release(view);
            break;
        }
        if (size <= JOINED_MAX) {
            memcpy(joined + total, view->buf, (size_t)view->len);
            total += view->len;
            PyBuffer_Release(view);
        } else {
            vectors[held].iov_base = view->buf;
            vectors[held++].iov_len = (size_t)view->len;
            total += view->len;
        }
    }
    struct msghdr message = {.msg_iov = vectors, .msg_iovlen = (size_t)held};
    if (seen == count && total == size) /* `write` costs more: it looks for what only files have */
        taken = size <= JOINED_MAX ? send(fd, joined, (size_t)size, MSG_NOSIGNAL) : sendmsg(fd, &message, MSG_NOSIGNAL);
    while (held) PyBuffer_Release(&views[--held]);
    return taken > 0 ? taken : -1;
}

/* Flush a link as its method does, if that is plain: an open socket, within a turn's bound, and the kernel takes it all.
   The bytes written; 0 if the link did it itself, with what the kernel has taken already. */
static PyObject *flush(PyObject *Py_UNUSED(module), PyObject *link)
{
    static PyObject *is_closing, *flush_name;
    if ((is_closing == NULL && (is_closing = PyUnicode_InternFromString("is_closing")) == NULL)
        || (flush_name == NULL && (flush_name = PyUnicode_InternFromString("flush")) == NULL))
        return NULL;
    Py_ssize_t taken = -1;
    if (socket_type != NULL && is(link, socket_type) && count_at(link, outbox_state) == 0
        && at(link, socket_blocked) == Py_False && at(link, outbox_congested) == Py_False
        && count_at(link, outbox_counted) == 0) {
        PyObject *pieces = at(link, outbox_pieces), *limits = at(link, outbox_limits), *transport = at(link, socket_transport);
        Py_ssize_t enqueued = count_at(link, outbox_enqueued), flushed = count_at(link, outbox_flushed),
                   fd = count_at(link, socket_fd), size = enqueued - flushed;
        if (enqueued >= 0 && flushed >= 0 && size > 0 && size <= count_at(link, socket_turn) && fd >= 0 && fd <= INT_MAX
            && pieces && PyList_CheckExact(pieces) && is(limits, limits_type) && transport
            && at(link, outbox_hard) == at(limits, limits_hard)) {
            PyObject *closing = PyObject_CallMethodNoArgs(transport, is_closing);
            if (closing == NULL)
                return NULL;
            if (closing == Py_False)
                taken = write_pieces((int)fd, pieces, size);
            Py_DECREF(closing);
            if (taken == size) {
                put(link, outbox_flushed, at(link, outbox_enqueued));
                put(link, outbox_dirty, Py_False);
                if (PyList_SetSlice(pieces, 0, PyList_GET_SIZE(pieces), NULL) < 0)
                    return NULL;
                return PyLong_FromSsize_t(size);
            }
        }
    }
    PyObject *arguments[2] = {link, taken > 0 ? PyLong_FromSsize_t(taken) : NULL}, *done;
    if (taken > 0 && arguments[1] == NULL)
        return NULL;
    done = PyObject_VectorcallMethod(flush_name, arguments, taken > 0 ? 2 : 1, NULL);
    Py_XDECREF(arguments[1]);
    if (done == NULL)
        return NULL;
    Py_DECREF(done);
    return PyLong_FromLong(0);
}

static PyObject *flush_all_method; /* links.link's own Writer._flush */

/* Let a method do in Python what it stands for. */
static PyObject *in_python(PyObject *method, PyObject *const *args, Py_ssize_t count)
{
    if (method != NULL)
        return PyObject_Vectorcall(method, args, (size_t)count, NULL);
    PyErr_SetString(PyExc_RuntimeError, "know_outbox and know_socket come first");
    return NULL;
}

static Py_ssize_t per_slice_max; /* links that it looks at in one turn: more are left to it */

/* Writer._flush, in C where that is one slice of links: whatever a link leaves to Python, `flush` does. */
static PyObject *flush_all(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t count)
{
    static PyObject *again;
    PyObject *marks = count == 1 ? args[0] : NULL, *links, *counters, *fresh;
    if (!is(marks, marks_type) || (links = at(marks, marks_dirty)) == NULL || !PyList_CheckExact(links)
        || PyList_GET_SIZE(links) > per_slice_max || !is(counters = at(marks, marks_counters), link_counters_type)
        || at(marks, marks_flush_link) == NULL || !PyCFunction_CheckExact(at(marks, marks_flush_link))
        || PyCFunction_GET_FUNCTION(at(marks, marks_flush_link)) != (PyCFunction)flush)
        return in_python(flush_all_method, args, count);
    if ((again == NULL && (again = PyUnicode_InternFromString("mark_again")) == NULL) || (fresh = PyList_New(0)) == NULL)
        return NULL;
    Py_INCREF(links);
    Py_INCREF(counters);
    put(marks, marks_dirty, fresh);
    Py_DECREF(fresh);
    put(marks, marks_scheduled, Py_False);
    Py_ssize_t writes = 0, written = 0, at_link = 0, size = 0;
    for (; size >= 0 && at_link < PyList_GET_SIZE(links); at_link++) {
        PyObject *link = Py_NewRef(PyList_GET_ITEM(links, at_link)), *flushed = flush(NULL, link);
        size = flushed ? PyLong_AsSsize_t(flushed) : -1;
        Py_XDECREF(flushed);
        Py_DECREF(link);
        writes += size > 0;
        written += size > 0 ? size : 0;
    }
    PyObject *type = NULL, *error = NULL, *trace = NULL;
    if (size < 0) { /* what ends programs came through, perhaps: the others may go on */
        PyErr_Fetch(&type, &error, &trace);
        PyObject *rest = PyList_GetSlice(links, at_link, PyList_GET_SIZE(links)),
                 *marked = rest ? PyObject_CallMethodOneArg(marks, again, rest) : NULL;
        Py_XDECREF(rest);
        Py_XDECREF(marked);
        PyErr_Clear();
    }
    int counted = bump(counters, counters_writes, writes) == 0 && bump(counters, counters_bytes_out, written) == 0;
    Py_DECREF(links);
    Py_DECREF(counters);
    if (type != NULL) {
        PyErr_Clear();
        PyErr_Restore(type, error, trace);
        return NULL;
    }
    if (!counted)
        return NULL;
    Py_RETURN_NONE;
}

/* ------------------------------------------------------------------ receive */

/* A link's parser if nothing stands in the way of reading plain frames, borrowed. */
static PyObject *idle_parser(PyObject *link)
{
    PyObject *parser = is(link, socket_type) && is(at(link, link_reader), &ReaderType) ? at(link, link_parser) : NULL;
    int idle = is(parser, parser_type) && count_at(parser, parser_need) == 0 && count_at(parser, parser_opcode) == 0
               && at(parser, parser_ended) == Py_False && at(parser, parser_more) == Py_False
               && at(parser, parser_rest) != NULL && PyBytes_CheckExact(at(parser, parser_rest));
    return idle ? parser : NULL;
}

/* SocketLink.get_buffer, in C where no frame has begun. */
static PyObject *get_buffer(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t count)
{
    PyObject *parser = count == 2 ? idle_parser(args[0]) : NULL, *links, *room;
    if (parser != NULL && PyBytes_GET_SIZE(at(parser, parser_rest)) == 0 && is(links = at(args[0], link_links), loop_type)
        && (room = at(links, loop_whole_room)) != NULL) {
        PyObject *zero = PyLong_FromLong(0);
        if (zero == NULL)
            return NULL;
        put(args[0], socket_rest_size, zero);
        Py_DECREF(zero);
        return Py_NewRef(room);
    }
    return in_python(get_buffer_method, args, count);
}

/* Whether all of them were made of messages. */
static int all_decoded(PyObject *events)
{
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(events); i++)
        if (PyTuple_CheckExact(PyList_GET_ITEM(events, i)))
            return 0;
    return 1;
}

/* Give a link's receiver what was read, as Link._receive does; -1 with an error. */
static int hand_on(PyObject *link, PyObject *events)
{
    static PyObject *decoded_name, *failed_name;
    if ((decoded_name == NULL && (decoded_name = PyUnicode_InternFromString("decoded")) == NULL)
        || (failed_name == NULL && (failed_name = PyUnicode_InternFromString("decoding_failed")) == NULL))
        return -1;
    if (PyList_GET_SIZE(events) == 0 || count_at(link, outbox_state) != 0)
        return 0;
    PyObject *receiver = at(link, link_receiver), *decoded = is(receiver, peer_type) ? at(receiver, peer_decoded) : NULL;
    decoded = decoded ? Py_NewRef(decoded) : PyObject_GetAttr(receiver ? receiver : Py_None, decoded_name);
    PyObject *done = decoded ? PyObject_CallOneArg(decoded, events) : NULL;
    Py_XDECREF(decoded);
    if (done == NULL && PyErr_Occurred() && PyErr_ExceptionMatches(PyExc_Exception)) {
        PyObject *type, *error, *trace;
        PyErr_Fetch(&type, &error, &trace);
        PyErr_NormalizeException(&type, &error, &trace);
        if (trace)
            PyException_SetTraceback(error, trace);
        done = PyObject_CallMethodOneArg(link, failed_name, error);
        Py_XDECREF(type);
        Py_XDECREF(error);
        Py_XDECREF(trace);
    }
    Py_XDECREF(done);
    return done ? 0 : -1;
}

/* The rest by the rules, then all that came, in Python. */
static int go_on(PyObject *link, PyObject *parser, PyObject *events, const char *rest, Py_ssize_t size, PyObject *fresh)
{
    static PyObject *go_on_name, *receive_name;
    if ((go_on_name == NULL && (go_on_name = PyUnicode_InternFromString("go_on")) == NULL)
        || (receive_name == NULL && (receive_name = PyUnicode_InternFromString("_receive")) == NULL))
        return -1;
    if (size) {
        PyObject *arguments[4] = {parser, PyBytes_FromStringAndSize(rest, size), events, fresh}, *done;
        if (arguments[1] == NULL)
            return -1;
        done = PyObject_VectorcallMethod(go_on_name, arguments, 4, NULL);
        Py_DECREF(arguments[1]);
        Py_XDECREF(done);
        if (done == NULL)
            return -1;
    }
    PyObject *done = PyObject_CallMethodOneArg(link, receive_name, events);
    Py_XDECREF(done);
    return done ? 0 : -1;
}

/* SocketLink.buffer_updated, in C where plain frames with plain messages came. */
static PyObject *buffer_updated(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t count)
{
    PyObject *link = count == 2 ? args[0] : NULL, *parser = link && PyLong_CheckExact(args[1]) ? idle_parser(link) : NULL,
             *links, *counters, *buffer;
    Py_ssize_t fresh = parser ? PyLong_AsSsize_t(args[1]) : -1, rest = parser ? PyBytes_GET_SIZE(at(parser, parser_rest)) : 0;
    if (fresh <= 0 || count_at(link, socket_rest_size) != rest || at(link, link_begun) != Py_True
        || at(link, link_no_more) != Py_False || !is(links = at(link, link_links), loop_type)
        || !is(counters = at(links, loop_counters), link_counters_type) || (buffer = at(links, loop_buffer)) == NULL
        || ((Reader *)at(link, link_reader))->reading) {
        PyErr_Clear();
        return in_python(buffer_updated_method, args, count);
    }
    Py_buffer view;
    PyObject *events = PyList_New(0), *reader = Py_NewRef(at(link, link_reader));
    int failed = events == NULL || PyObject_GetBuffer(buffer, &view, PyBUF_SIMPLE) < 0;
    if (!failed) {
        if (rest) { /* it stands at the beginning of the buffer too */
            PyObject *nothing = PyBytes_FromStringAndSize(NULL, 0);
            if (nothing)
                put(parser, parser_rest, nothing);
            failed = nothing == NULL;
            Py_XDECREF(nothing);
        }
        if (rest + fresh > view.len) {
            PyErr_SetString(PyExc_ValueError, "more came than there was room for");
            failed = 1;
        }
        Py_ssize_t size = rest + fresh, position = -1;
        put(link, link_heard, Py_True);
        if (!failed && bump(counters, counters_bytes_in, fresh) == 0)
            position = read_frames((Reader *)reader, &view, 0, size, events);
        failed = position < 0;
        if (!failed && position == size && all_decoded(events))
            failed = bump(counters, counters_frames_in, PyList_GET_SIZE(events)) < 0 || hand_on(link, events) < 0;
        else if (!failed)
            failed = go_on(link, parser, events, (const char *)view.buf + position, size - position, args[1]) < 0;
        PyBuffer_Release(&view);
    }
    Py_XDECREF(events);
    Py_DECREF(reader);
    if (failed)
        return NULL;
    Py_RETURN_NONE;
}

/* A function that binds as a method of the class it is put into. */
static int add_method(PyObject *made, PyMethodDef *definition)
{
    PyObject *function = PyCFunction_New(definition, NULL), *method = function ? PyInstanceMethod_New(function) : NULL;
    int added = method ? PyModule_AddObjectRef(made, definition->ml_name, method) : -1;
    Py_XDECREF(function);
    Py_XDECREF(method);
    return added;
}

static PyMethodDef get_buffer_definition = {"get_buffer", (PyCFunction)(void (*)(void))get_buffer, METH_FASTCALL,
                                            "get_buffer(link, sizehint)\n--\n\nSocketLink.get_buffer."},
                   flush_all_definition = {"flush_all", (PyCFunction)(void (*)(void))flush_all, METH_FASTCALL,
                                           "flush_all(writer)\n--\n\nWriter._flush of links.link."},
                   buffer_updated_definition = {"buffer_updated", (PyCFunction)(void (*)(void))buffer_updated, METH_FASTCALL,
                                                "buffer_updated(link, nbytes)\n--\n\nSocketLink.buffer_updated."};

/* ------------------------------------------------------------------ module */

static PyObject *know(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t count)
{
    PyTypeObject **types[] = {&asked_type, &answered_type, &body_type, &call_type, &end_type, &attempt_type, &request_type,
                              &options_type, &reply_meta_type};
    const Py_ssize_t known = sizeof(types) / sizeof(*types);
    static const Slot slots[] = {
        {&body_type, "raw", &body_raw}, {&body_type, "attachments", &body_attachments},
        {&call_type, "attempt", &call_attempt}, {&call_type, "endpoint", &call_endpoint},
        {&call_type, "method", &call_method}, {&call_type, "body", &call_body}, {&call_type, "left_s", &call_left},
        {&end_type, "wire_id", &end_wire_id}, {&end_type, "outcome", &end_outcome}, {&end_type, "body", &end_body},
        {&end_type, "meta", &end_meta},
        {&attempt_type, "id", &attempt_id}, {&attempt_type, "request", &attempt_request},
        {&attempt_type, "mark", &attempt_mark}, {&request_type, "options", &request_options},
        {&options_type, "timeout", &options_timeout}, {&options_type, "meta", &options_meta},
        {&options_type, "idempotent", &options_idempotent}, {&options_type, "key", &options_key},
        {&options_type, "trace", &options_trace}, {&options_type, "progress", &options_progress},
        {&options_type, "idle", &options_idle}, {&options_type, "stream_in", &options_stream_in},
        {&options_type, "stream_out", &options_stream_out},
        {&reply_meta_type, "worker", &meta_worker}, {&reply_meta_type, "attempts", &meta_attempts},
        {&reply_meta_type, "elapsed_ms", &meta_elapsed}, {&reply_meta_type, "retryable", &meta_retryable},
        {&reply_meta_type, "trace", &meta_trace}, {&reply_meta_type, "timing", &meta_timing},
        {&reply_meta_type, "repeated", &meta_repeated},
    };
    if (count != known + 1) {
        PyErr_SetString(PyExc_TypeError, "know takes ten arguments");
        return NULL;
    }
    for (Py_ssize_t i = 0; i < known; i++) {
        if (!PyType_Check(args[i])) {
            PyErr_SetString(PyExc_TypeError, "know takes types, and ENDED_OK last");
            return NULL;
        }
        Py_XSETREF(*types[i], (PyTypeObject *)Py_NewRef(args[i]));
    }
    Py_XSETREF(ended_ok, Py_NewRef(args[known]));
    if (find_slots(slots, sizeof(slots) / sizeof(*slots)) < 0)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *know_outbox(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t count)
{
    static PyTypeObject *given, *marks;
    static const Slot slots[] = {
        {&given, "_state", &outbox_state}, {&given, "enqueued", &outbox_enqueued}, {&given, "flushed", &outbox_flushed},
        {&given, "_hard_bytes", &outbox_hard}, {&given, "_congested", &outbox_congested},
        {&given, "_pieces", &outbox_pieces}, {&given, "dirty", &outbox_dirty}, {&given, "_counted", &outbox_counted},
        {&given, "_limits", &outbox_limits}, {&marks, "_dirty", &marks_dirty}, {&marks, "_scheduled", &marks_scheduled},
        {&marks, "_loop", &marks_loop}, {&marks, "_counters", &marks_counters}, {&marks, "_flush_link", &marks_flush_link},
    };
    if (count != 4 || !PyType_Check(args[0]) || !PyType_Check(args[1])) {
        PyErr_SetString(PyExc_TypeError, "know_outbox takes two types, a function and a number");
        return NULL;
    }
    per_slice_max = PyLong_AsSsize_t(args[3]);
    if (PyErr_Occurred())
        return NULL;
    given = (PyTypeObject *)args[0];
    marks = (PyTypeObject *)args[1];
    if (find_slots(slots, sizeof(slots) / sizeof(*slots)) < 0)
        return NULL;
    Py_XSETREF(outbox_type, (PyTypeObject *)Py_NewRef(args[0]));
    Py_XSETREF(marks_type, (PyTypeObject *)Py_NewRef(args[1]));
    Py_XSETREF(flush_all_method, Py_NewRef(args[2]));
    Py_RETURN_NONE;
}

static PyObject *know_peer(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t count)
{
    static PyTypeObject *session, *peer;
    static const Slot slots[] = {
        {&session, "link", &session_link}, {&peer, "_writer", &peer_writer}, {&peer, "_held", &peer_held},
        {&peer, "_batched", &peer_batched}, {&peer, "_feeding", &peer_feeding}, {&peer, "decoded", &peer_decoded},
    };
    if (count != 2 || !PyType_Check(args[0]) || !PyType_Check(args[1])) {
        PyErr_SetString(PyExc_TypeError, "know_peer takes two types");
        return NULL;
    }
    session = (PyTypeObject *)args[0];
    peer = (PyTypeObject *)args[1];
    if (find_slots(slots, sizeof(slots) / sizeof(*slots)) < 0)
        return NULL;
    Py_XSETREF(session_type, (PyTypeObject *)Py_NewRef(args[0]));
    Py_XSETREF(peer_type, (PyTypeObject *)Py_NewRef(args[1]));
    Py_RETURN_NONE;
}

static PyObject *know_socket(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t count)
{
    static PyTypeObject *given, *limits, *loop, *counters, *parser;
    static const Slot slots[] = {
        {&given, "blocked", &socket_blocked}, {&given, "_fd", &socket_fd}, {&given, "_transport", &socket_transport},
        {&given, "turn_bytes", &socket_turn}, {&given, "_rest_size", &socket_rest_size}, {&given, "reader", &link_reader},
        {&given, "_links", &link_links}, {&given, "_parser", &link_parser}, {&given, "_begun", &link_begun},
        {&given, "_no_more", &link_no_more}, {&given, "_receiver", &link_receiver}, {&given, "heard", &link_heard},
        {&limits, "outbox_hard_bytes", &limits_hard}, {&loop, "receive_buffer", &loop_buffer},
        {&loop, "whole_receive_room", &loop_whole_room}, {&loop, "counters", &loop_counters},
        {&counters, "writes", &counters_writes}, {&counters, "bytes_out", &counters_bytes_out},
        {&counters, "bytes_in", &counters_bytes_in}, {&counters, "frames_in", &counters_frames_in},
        {&parser, "_rest", &parser_rest}, {&parser, "_need", &parser_need}, {&parser, "_opcode", &parser_opcode},
        {&parser, "ended", &parser_ended}, {&parser, "more", &parser_more},
    };
    PyTypeObject **names[] = {&given, &limits, &loop, &counters, &parser},
                 **types[] = {&socket_type, &limits_type, &loop_type, &link_counters_type, &parser_type};
    for (Py_ssize_t i = 0; i < 5; i++) {
        if (count != 7 || !PyType_Check(args[i])) {
            PyErr_SetString(PyExc_TypeError, "know_socket takes five types and two functions");
            return NULL;
        }
        *names[i] = (PyTypeObject *)args[i];
    }
    if (outbox_type == NULL || !PyType_IsSubtype(given, outbox_type)) {
        PyErr_SetString(PyExc_TypeError, "know_outbox comes first");
        return NULL;
    }
    if (find_slots(slots, sizeof(slots) / sizeof(*slots)) < 0)
        return NULL;
    for (int i = 0; i < 5; i++) Py_XSETREF(*types[i], (PyTypeObject *)Py_NewRef(args[i]));
    Py_XSETREF(get_buffer_method, Py_NewRef(args[5]));
    Py_XSETREF(buffer_updated_method, Py_NewRef(args[6]));
    Py_RETURN_NONE;
}

static PyMethodDef functions[] = {
    {"know_socket", (PyCFunction)(void (*)(void))know_socket, METH_FASTCALL,
     "know_socket(SocketLink, LinkLimits, LoopLinks, LinkCounters, FrameParser, get_buffer, buffer_updated)\n--\n\nThe types "
     "of the links that `flush` writes and `buffer_updated` reads, and their own methods; once, before the first."},
    {"flush", (PyCFunction)flush, METH_O,
     "flush(link)\n--\n\nFlush a link; the bytes written, 0 where the link's own method has done it, and counted."},
    {"know", (PyCFunction)(void (*)(void))know, METH_FASTCALL,
     "know(Asked, Answered, Body, Call, End, Attempt, Request, Options, ReplyMeta, ENDED_OK)\n--\n\nThe types of the core; "
     "once, before all else."},
    {"know_outbox", (PyCFunction)(void (*)(void))know_outbox, METH_FASTCALL,
     "know_outbox(Link, Writer, flush, links_per_slice)\n--\n\nThe types of the links that a Writer here writes to, and of "
     "what flushes them, with its own method and bound; once, before the first."},
    {"know_peer", (PyCFunction)(void (*)(void))know_peer, METH_FASTCALL,
     "know_peer(Session, WebSocketPeer)\n--\n\nThe types of the sessions and peers that `spread` passes by; once."},
    {"know_core", (PyCFunction)(void (*)(void))know_core, METH_FASTCALL,
     "know_core(types, levels_max, small_bytes)\n--\n\nThe types of the router's tables, for Matcher; once."},
    {"spread", (PyCFunction)(void (*)(void))spread, METH_FASTCALL,
     "spread(frame, sessions)\n--\n\nQueue a broadcast where that is plain; the sessions that are left."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT,
    .m_name = "broker.wire._native",
    .m_doc = "The hot path of the wire in C.",
    .m_size = -1,
    .m_methods = functions,
};

PyMODINIT_FUNC PyInit__native(void)
{
    if (PyType_Ready(&ReaderType) < 0 || PyType_Ready(&WriterType) < 0 || PyType_Ready(&MatcherType) < 0
        || PyType_Ready(&FeederType) < 0)
        return NULL;
    PyObject *made = PyModule_Create(&module);
    if (made == NULL)
        return NULL;
    if (PyModule_AddObjectRef(made, "Reader", (PyObject *)&ReaderType) < 0
        || PyModule_AddObjectRef(made, "Writer", (PyObject *)&WriterType) < 0
        || PyModule_AddObjectRef(made, "Matcher", (PyObject *)&MatcherType) < 0
        || PyModule_AddObjectRef(made, "Feeder", (PyObject *)&FeederType) < 0
        || add_method(made, &flush_all_definition) < 0 || add_method(made, &get_buffer_definition) < 0
        || add_method(made, &buffer_updated_definition) < 0) {
        Py_DECREF(made);
        return NULL;
    }
    return made;
}
