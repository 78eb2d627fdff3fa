/* The hot path of the wire in C: whole, plain frames in, events out; common messages in, whole frames out.

   It only ever *accepts*. Whatever is not the common case, or not right, is left to the Python of `wire.frames` and
   `wire.jsonrpc`, which judges it: `Reader.read` stops before such a frame, or hands its payload on as it is, and
   `Writer.frame` returns None. So there is one place for every rule, and this file knows only what plain looks like:

     {"jsonrpc": "2.0", "id": 7, "method": "read", "params": …}     members in any order, none twice, no other
     {"jsonrpc": "2.0", "id": "<ours>", "result": …}

   Params and results are checked to be JSON (RFC 8259) and copied as they are. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#define DEPTH_MAX 64           /* deeper nesting is left to Python */
#define ID_MAX 128             /* bytes of a string id, as in wire.jsonrpc */
#define DIGITS_MAX 18          /* of a number that needs no closer look */
#define SMALL_MAX 61440        /* bytes of a payload up to which Writer.frame copies it; its frame is below 64 KiB */
#define UNSPLIT_MAX 65535      /* bytes of a frame's payload with a 16-bit length */

typedef const unsigned char *Text;

/* ------------------------------------------------------------------ JSON */

/* The end of a string whose first byte after the quote is at p: at its closing quote. NULL if it is not plain:
   control characters, escapes that are wrong or half of a surrogate pair. */
static Text string_end(Text p, Text end)
{
    for (;;) {
#if defined(__SSE2__)
        const __m128i quote = _mm_set1_epi8('"'), slash = _mm_set1_epi8('\\'), blank = _mm_set1_epi8(0x1F);
        while (end - p >= 16) {
            __m128i b = _mm_loadu_si128((const __m128i *)p);
            __m128i hit = _mm_or_si128(_mm_or_si128(_mm_cmpeq_epi8(b, quote), _mm_cmpeq_epi8(b, slash)),
                                       _mm_cmpeq_epi8(_mm_min_epu8(b, blank), b));
            int mask = _mm_movemask_epi8(hit);
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

static void unmask(unsigned char *to, Text from, Py_ssize_t size, Text mask)
{
    uint32_t one;
    memcpy(&one, mask, 4);
    uint64_t two = (uint64_t)one << 32 | one;
    Py_ssize_t at = 0;
#if defined(__SSE2__)
    const __m128i four = _mm_set1_epi32((int)one);
    for (; size - at >= 16; at += 16)
        _mm_storeu_si128((__m128i *)(to + at), _mm_xor_si128(_mm_loadu_si128((const __m128i *)(from + at)), four));
#endif
    for (; size - at >= 8; at += 8) {
        uint64_t word;
        memcpy(&word, from + at, 8);
        word ^= two;
        memcpy(to + at, &word, 8);
    }
    for (; at < size; at++)
        to[at] = from[at] ^ mask[at & 3];
}

/* ------------------------------------------------------------------ Reader */

static PyObject *asked_type, *answered_type, *body_type, *call_type, *end_type, *ended_ok;
static PyObject *str_attempt, *str_id, *str_endpoint, *str_method, *str_body, *str_raw, *str_attachments, *str_wire_id,
    *str_outcome, *str_meta;

typedef struct {
    PyObject_HEAD
    PyObject *session;  /* whose events these are; NULL: payloads are handed on as they are */
    PyObject *prefix;   /* bytes: what ids of this peer's attempts begin with, the quote included */
    PyObject *routes;   /* dict: methods as written that were found good -> (endpoint, method) */
    PyObject *defaults; /* the options of a call that names none */
    PyObject *last;     /* bytes: the method of the last call, and its route */
    PyObject *route;
    unsigned char *scratch;
    Py_ssize_t room;
    Py_ssize_t size_max;
    Py_ssize_t events_max;
    int masked;
} Reader;

static int Reader_init(Reader *self, PyObject *args, PyObject *named)
{
    static char *names[] = {"masked", "message_max_bytes", "events_max", NULL};
    if (!PyArg_ParseTupleAndKeywords(args, named, "pnn", names, &self->masked, &self->size_max, &self->events_max))
        return -1;
    return 0;
}

static void Reader_dealloc(Reader *self)
{
    PyObject_GC_UnTrack(self);
    Py_CLEAR(self->session);
    Py_CLEAR(self->prefix);
    Py_CLEAR(self->routes);
    Py_CLEAR(self->defaults);
    Py_CLEAR(self->last);
    Py_CLEAR(self->route);
    PyMem_Free(self->scratch);
    Py_TYPE(self)->tp_free((PyObject *)self);
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
    Py_CLEAR(self->route);
    return 0;
}

static PyObject *Reader_decode_for(Reader *self, PyObject *const *args, Py_ssize_t count)
{
    if (count != 4 || !PyBytes_Check(args[1]) || !PyDict_Check(args[2])) {
        PyErr_SetString(PyExc_TypeError, "decode_for(session, prefix: bytes, routes: dict, defaults)");
        return NULL;
    }
    Py_XSETREF(self->session, Py_NewRef(args[0]));
    Py_XSETREF(self->prefix, Py_NewRef(args[1]));
    Py_XSETREF(self->routes, Py_NewRef(args[2]));
    Py_XSETREF(self->defaults, Py_NewRef(args[3]));
    Py_CLEAR(self->last);
    Py_CLEAR(self->route);
    Py_RETURN_NONE;
}

static PyObject *Reader_decode_no_more(Reader *self, PyObject *Py_UNUSED(ignored))
{
    Py_CLEAR(self->session);
    Py_RETURN_NONE;
}

/* The route of a method, borrowed; NULL without an error if it has none yet. */
static PyObject *route_of(Reader *self, Text method, Py_ssize_t size)
{
    if (self->last && PyBytes_GET_SIZE(self->last) == size && !memcmp(PyBytes_AS_STRING(self->last), method, size))
        return self->route;
    PyObject *name = PyUnicode_DecodeASCII((const char *)method, size, NULL);
    if (name == NULL) {
        PyErr_Clear();
        return NULL;
    }
    PyObject *route = PyDict_GetItemWithError(self->routes, name);
    Py_DECREF(name);
    if (route == NULL || !PyTuple_Check(route) || PyTuple_GET_SIZE(route) != 2) {
        PyErr_Clear();
        return NULL;
    }
    PyObject *last = PyBytes_FromStringAndSize((const char *)method, size);
    if (last == NULL) {
        PyErr_Clear();
        return NULL;
    }
    Py_XSETREF(self->last, last);
    Py_XSETREF(self->route, Py_NewRef(route));
    return route;
}

/* A plain call or reply as an event. NULL without an error if it is none. */
static PyObject *decode(Reader *self, Text p, Text end)
{
    Text id = NULL, id_end = NULL, method = NULL, method_end = NULL, params = NULL, params_end = NULL, result = NULL,
         result_end = NULL;
    int version = 0;
    if (p >= end || *p++ != '{')
        return NULL;
    p = skip_blanks(p, end);
    for (;;) {
        if (p >= end || *p++ != '"')
            return NULL;
        Text name = p;
        while (p < end && *p != '"' && *p != '\\') p++;
        if (p >= end || *p != '"')
            return NULL;
        Py_ssize_t size = p - name;
        p = skip_blanks(p + 1, end);
        if (p >= end || *p != ':')
            return NULL;
        p = skip_blanks(p + 1, end);
        if (size == 2 && !memcmp(name, "id", 2)) {
            if (id || p >= end) return NULL;
            id = p;
            if (*p == '"') {
                if ((p = string_end(p + 1, end)) == NULL) return NULL;
                p++;
                if (p - id > ID_MAX + 2 || memchr(id, '\\', p - id)) return NULL;
            } else {
                while (p < end && *p >= '0' && *p <= '9') p++;
                if (p == id || p - id > DIGITS_MAX || (*id == '0' && p - id > 1)) return NULL;
            }
            id_end = p;
        } else if (size == 6 && !memcmp(name, "method", 6)) {
            if (method || p >= end || *p != '"') return NULL;
            method = ++p;
            if ((p = string_end(p, end)) == NULL) return NULL;
            method_end = p++;
        } else if (size == 6 && !memcmp(name, "params", 6)) {
            if (params) return NULL;
            params = p;
            if ((p = value_end(p, end)) == NULL) return NULL;
            params_end = p;
        } else if (size == 6 && !memcmp(name, "result", 6)) {
            if (result) return NULL;
            result = p;
            if ((p = value_end(p, end)) == NULL) return NULL;
            result_end = p;
        } else if (size == 7 && !memcmp(name, "jsonrpc", 7)) {
            if (version || end - p < 5 || memcmp(p, "\"2.0\"", 5)) return NULL;
            version = 1;
            p += 5;
        } else {
            return NULL;
        }
        p = skip_blanks(p, end);
        if (p >= end)
            return NULL;
        if (*p == '}')
            break;
        if (*p++ != ',')
            return NULL;
        p = skip_blanks(p, end);
    }
    if (skip_blanks(p + 1, end) != end || !version || !id)
        return NULL;

    PyObject *event = NULL, *body = NULL, *raw = NULL;
    if (method) {
        if (!params || result)
            return NULL;
        PyObject *route = route_of(self, method, method_end - method);
        if (route == NULL)
            return NULL;
        PyObject *wire_id = PyBytes_FromStringAndSize((const char *)id, id_end - id);
        raw = PyBytes_FromStringAndSize((const char *)params, params_end - params);
        if (wire_id && raw) {
            body = PyObject_Vectorcall(body_type, &raw, 1, NULL);
            if (body) {
                PyObject *values[6] = {self->session, wire_id, PyTuple_GET_ITEM(route, 0), PyTuple_GET_ITEM(route, 1),
                                       body, self->defaults};
                event = PyObject_Vectorcall(asked_type, values, 6, NULL);
            }
        }
        Py_XDECREF(wire_id);
    } else if (result && !params) {
        Py_ssize_t head = PyBytes_GET_SIZE(self->prefix);
        if (id_end - id < head + 2 || memcmp(id, PyBytes_AS_STRING(self->prefix), head))
            return NULL;
        unsigned long long number = 0;
        Text digit = id + head;
        if (id_end - 1 - digit > DIGITS_MAX)
            return NULL;
        for (; digit < id_end - 1; digit++) {
            if (*digit < '0' || *digit > '9') return NULL;
            number = number * 10 + (*digit - '0');
        }
        PyObject *attempt = PyLong_FromUnsignedLongLong(number);
        raw = PyBytes_FromStringAndSize((const char *)result, result_end - result);
        if (attempt && raw) {
            body = PyObject_Vectorcall(body_type, &raw, 1, NULL);
            if (body) {
                PyObject *values[3] = {self->session, attempt, body};
                event = PyObject_Vectorcall(answered_type, values, 3, NULL);
            }
        }
        Py_XDECREF(attempt);
    } else {
        return NULL;
    }
    Py_XDECREF(raw);
    Py_XDECREF(body);
    return event;
}

/* read(data, position, stop, events) -> position: take whole plain frames from data[position:stop]. */
static PyObject *Reader_read(Reader *self, PyObject *const *args, Py_ssize_t count)
{
    if (count != 4 || !PyList_CheckExact(args[3])) {
        PyErr_SetString(PyExc_TypeError, "read(data, position: int, stop: int, events: list)");
        return NULL;
    }
    Py_ssize_t position = PyLong_AsSsize_t(args[1]), stop = PyLong_AsSsize_t(args[2]);
    PyObject *events = args[3];
    Py_buffer view;
    if (PyErr_Occurred() || PyObject_GetBuffer(args[0], &view, PyBUF_SIMPLE) < 0)
        return NULL;
    if (stop > view.len)
        stop = view.len;
    Text data = view.buf;
    const int skip = self->masked ? 6 : 2;
    while (position >= 0 && stop - position >= 2 && PyList_GET_SIZE(events) < self->events_max) {
        Text head = data + position;
        if (head[0] != 0x81 && head[0] != 0x82)
            break;
        if ((head[1] & 0x80) != (self->masked ? 0x80 : 0))
            break;
        Py_ssize_t size = head[1] & 0x7F, start = skip;
        if (size == 126) {
            if (stop - position < 4) break;
            size = head[2] << 8 | head[3];
            if (size < 126) break;
            start += 2;
        } else if (size == 127) {
            if (stop - position < 10) break;
            uint64_t large = 0;
            for (int i = 2; i < 10; i++) large = large << 8 | head[i];
            if (large < 65536 || large > (uint64_t)self->size_max) break;
            size = (Py_ssize_t)large;
            start += 8;
        }
        if (size > self->size_max || stop - position < start + size)
            break;
        Text payload = head + start;
        PyObject *event = NULL, *text = NULL;
        unsigned char *plain;
        int decodes = self->session && head[0] == 0x81;
        if (decodes) { /* into a buffer that is used again: what an event keeps is copied out of it */
            if (self->masked) {
                if (self->room < size) {
                    unsigned char *larger = PyMem_Realloc(self->scratch, size + 64);
                    if (larger == NULL) {
                        PyErr_NoMemory();
                        goto failed;
                    }
                    self->scratch = larger;
                    self->room = size + 64;
                }
                plain = self->scratch;
                unmask(plain, payload, size, payload - 4);
            } else {
                plain = (unsigned char *)payload;
            }
            if (!is_ascii(plain, size) && !is_utf8(plain, size))
                break; /* by the rules */
            event = decode(self, plain, plain + size);
            if (event == NULL) {
                if (PyErr_Occurred()) goto failed;
                text = PyBytes_FromStringAndSize((const char *)plain, size);
                if (text == NULL) goto failed;
            }
        } else {
            text = PyBytes_FromStringAndSize(NULL, size);
            if (text == NULL) goto failed;
            plain = (unsigned char *)PyBytes_AS_STRING(text);
            if (self->masked)
                unmask(plain, payload, size, payload - 4);
            else
                memcpy(plain, payload, size);
            if (head[0] == 0x81 && !is_ascii(plain, size) && !is_utf8(plain, size)) {
                Py_DECREF(text);
                break;
            }
        }
        if (event == NULL) {
            event = Py_BuildValue("(iN)", head[0] & 0x0F, text);
            if (event == NULL) goto failed;
        }
        int added = PyList_Append(events, event);
        Py_DECREF(event);
        if (added < 0) goto failed;
        position += start + size;
    }
    if (self->room > 1 << 17) { /* one large message is no reason to hold on to so much */
        PyMem_Free(self->scratch);
        self->scratch = NULL;
        self->room = 0;
    }
    PyBuffer_Release(&view);
    return PyLong_FromSsize_t(position);
failed:
    PyBuffer_Release(&view);
    return NULL;
}

static PyMethodDef Reader_methods[] = {
    {"decode_for", (PyCFunction)(void (*)(void))Reader_decode_for, METH_FASTCALL,
     "decode_for(session, prefix, routes, defaults)\n--\n\nMake events of plain calls and replies from now on."},
    {"decode_no_more", (PyCFunction)Reader_decode_no_more, METH_NOARGS,
     "decode_no_more()\n--\n\nHand payloads on as they are."},
    {"read", (PyCFunction)(void (*)(void))Reader_read, METH_FASTCALL,
     "read(data, position, stop, events)\n--\n\nTake whole plain frames out of data; the position after the last."},
    {NULL},
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
};

/* ------------------------------------------------------------------ Writer */

typedef struct {
    PyObject_HEAD
    PyObject *prefix;   /* bytes: {"jsonrpc":"2.0","id":"<ours> */
    PyObject *endpoint; /* str: what the link is attached to */
} Writer;

static int Writer_init(Writer *self, PyObject *args, PyObject *named)
{
    static char *names[] = {"prefix", "endpoint", NULL};
    PyObject *prefix, *endpoint;
    if (!PyArg_ParseTupleAndKeywords(args, named, "SU", names, &prefix, &endpoint))
        return -1;
    Py_XSETREF(self->prefix, Py_NewRef(prefix));
    Py_XSETREF(self->endpoint, Py_NewRef(endpoint));
    return 0;
}

static void Writer_dealloc(Writer *self)
{
    Py_CLEAR(self->prefix);
    Py_CLEAR(self->endpoint);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

/* A frame of so many bytes in front of which there is room for its header. */
static PyObject *new_frame(Py_ssize_t size, unsigned char **payload)
{
    Py_ssize_t head = size < 126 ? 2 : 4;
    PyObject *frame = PyBytes_FromStringAndSize(NULL, head + size);
    if (frame == NULL)
        return NULL;
    unsigned char *p = (unsigned char *)PyBytes_AS_STRING(frame);
    p[0] = 0x81;
    if (head == 2) {
        p[1] = (unsigned char)size;
    } else {
        p[1] = 126;
        p[2] = (unsigned char)(size >> 8);
        p[3] = (unsigned char)size;
    }
    *payload = p + head;
    return frame;
}

#define PUT(p, from, size) (memcpy((p), (from), (size)), (p) += (size))
#define PUT_TEXT(p, text) PUT(p, text, sizeof(text) - 1)

/* What a body holds as JSON text, if it has no attachments and is small; -1 if not. The view must be released. */
static int body_text(PyObject *body, Py_buffer *view)
{
    int good = -1;
    PyObject *attachments = PyObject_GetAttr(body, str_attachments), *raw = NULL;
    if (attachments && PyTuple_CheckExact(attachments) && PyTuple_GET_SIZE(attachments) == 0) {
        raw = PyObject_GetAttr(body, str_raw);
        if (raw && PyObject_GetBuffer(raw, view, PyBUF_SIMPLE) == 0) {
            if (view->len > 0 && view->len <= SMALL_MAX)
                good = 0;
            else
                PyBuffer_Release(view);
        }
    }
    Py_XDECREF(attachments);
    Py_XDECREF(raw);
    return good;
}

static PyObject *write_call(Writer *self, PyObject *call)
{
    PyObject *frame = NULL, *attempt = PyObject_GetAttr(call, str_attempt), *number = NULL,
             *method = PyObject_GetAttr(call, str_method), *body = PyObject_GetAttr(call, str_body),
             *endpoint = PyObject_GetAttr(call, str_endpoint);
    if (attempt && method && body && endpoint && (number = PyObject_GetAttr(attempt, str_id))) {
        Py_buffer raw;
        Py_ssize_t name_size, endpoint_size = 0;
        const char *name = PyUnicode_AsUTF8AndSize(method, &name_size), *before = "";
        unsigned long long id = PyLong_AsUnsignedLongLong(number);
        if (name && !PyErr_Occurred() && endpoint != self->endpoint && PyUnicode_Compare(endpoint, self->endpoint))
            before = PyUnicode_AsUTF8AndSize(endpoint, &endpoint_size);
        if (name && before && !PyErr_Occurred() && body_text(body, &raw) == 0) {
            char digits[24];
            int n = 24;
            do digits[--n] = '0' + id % 10; while (id /= 10);
            static const char to_method[] = "\",\"method\":\"", to_params[] = "\",\"params\":";
            Py_ssize_t size = PyBytes_GET_SIZE(self->prefix) + (24 - n) + (Py_ssize_t)sizeof(to_method) - 1 + name_size
                              + (Py_ssize_t)sizeof(to_params) - 1 + raw.len + 1 + (endpoint_size ? endpoint_size + 1 : 0);
            unsigned char *p;
            frame = new_frame(size, &p);
            if (frame) {
                PUT(p, PyBytes_AS_STRING(self->prefix), PyBytes_GET_SIZE(self->prefix));
                PUT(p, digits + n, 24 - n);
                PUT_TEXT(p, to_method);
                if (endpoint_size) {
                    PUT(p, before, endpoint_size);
                    *p++ = '/';
                }
                PUT(p, name, name_size);
                PUT_TEXT(p, to_params);
                PUT(p, raw.buf, raw.len);
                *p = '}';
            }
            PyBuffer_Release(&raw);
        }
    }
    Py_XDECREF(attempt);
    Py_XDECREF(number);
    Py_XDECREF(method);
    Py_XDECREF(body);
    Py_XDECREF(endpoint);
    return frame;
}

static PyObject *write_end(PyObject *end)
{
    PyObject *frame = NULL, *wire_id = PyObject_GetAttr(end, str_wire_id), *outcome = PyObject_GetAttr(end, str_outcome),
             *meta = PyObject_GetAttr(end, str_meta), *body = PyObject_GetAttr(end, str_body);
    if (wire_id && meta == Py_None && outcome == ended_ok && body && body != Py_None && PyBytes_CheckExact(wire_id)) {
        Py_buffer raw;
        if (body_text(body, &raw) == 0) {
            static const char head[] = "{\"jsonrpc\":\"2.0\",\"id\":", middle[] = ",\"result\":";
            Py_ssize_t id_size = PyBytes_GET_SIZE(wire_id);
            Py_ssize_t size = (Py_ssize_t)sizeof(head) - 1 + id_size + (Py_ssize_t)sizeof(middle) - 1 + raw.len + 1;
            unsigned char *p;
            frame = new_frame(size, &p);
            if (frame) {
                PUT_TEXT(p, head);
                PUT(p, PyBytes_AS_STRING(wire_id), id_size);
                PUT_TEXT(p, middle);
                PUT(p, raw.buf, raw.len);
                *p = '}';
            }
            PyBuffer_Release(&raw);
        }
    }
    Py_XDECREF(wire_id);
    Py_XDECREF(outcome);
    Py_XDECREF(meta);
    Py_XDECREF(body);
    return frame;
}

static PyObject *Writer_frame(Writer *self, PyObject *message)
{
    PyObject *frame = NULL;
    if ((PyObject *)Py_TYPE(message) == call_type)
        frame = write_call(self, message);
    else if ((PyObject *)Py_TYPE(message) == end_type)
        frame = write_end(message);
    if (frame == NULL) {
        if (PyErr_Occurred())
            return NULL;
        Py_RETURN_NONE;
    }
    return frame;
}

static PyMethodDef Writer_methods[] = {
    {"frame", (PyCFunction)Writer_frame, METH_O,
     "frame(message)\n--\n\nThe whole frame of a plain call or a plain result; None for everything else."},
    {NULL},
};

static PyTypeObject WriterType = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "broker.wire._native.Writer",
    .tp_doc = "Writer(prefix, endpoint)\n--\n\nWrites the plain messages of one link that wants no meta.",
    .tp_basicsize = sizeof(Writer),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = PyType_GenericNew,
    .tp_init = (initproc)Writer_init,
    .tp_dealloc = (destructor)Writer_dealloc,
    .tp_methods = Writer_methods,
};

/* ------------------------------------------------------------------ module */

/* know(Asked, Answered, Body, Call, End, ENDED_OK): the types of the core, which this module does not import. */
static PyObject *know(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t count)
{
    PyObject **types[6] = {&asked_type, &answered_type, &body_type, &call_type, &end_type, &ended_ok};
    if (count != 6) {
        PyErr_SetString(PyExc_TypeError, "know(Asked, Answered, Body, Call, End, ENDED_OK)");
        return NULL;
    }
    for (int i = 0; i < 6; i++)
        Py_XSETREF(*types[i], Py_NewRef(args[i]));
    Py_RETURN_NONE;
}

static PyMethodDef functions[] = {
    {"know", (PyCFunction)(void (*)(void))know, METH_FASTCALL,
     "know(Asked, Answered, Body, Call, End, ENDED_OK)\n--\n\nThe types of the core; once, before all else."},
    {NULL},
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
    PyObject **names[] = {&str_attempt, &str_id, &str_endpoint, &str_method, &str_body, &str_raw, &str_attachments,
                          &str_wire_id, &str_outcome, &str_meta};
    static const char *texts[] = {"attempt", "id", "endpoint", "method", "body", "raw", "attachments", "wire_id",
                                  "outcome", "meta"};
    for (size_t i = 0; i < sizeof(names) / sizeof(*names); i++)
        if ((*names[i] = PyUnicode_InternFromString(texts[i])) == NULL)
            return NULL;
    if (PyType_Ready(&ReaderType) < 0 || PyType_Ready(&WriterType) < 0)
        return NULL;
    PyObject *made = PyModule_Create(&module);
    if (made == NULL)
        return NULL;
    if (PyModule_AddObjectRef(made, "Reader", (PyObject *)&ReaderType) < 0
        || PyModule_AddObjectRef(made, "Writer", (PyObject *)&WriterType) < 0) {
        Py_DECREF(made);
        return NULL;
    }
    return made;
}
