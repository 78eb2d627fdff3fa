/* What the files of the compiled core share: Python's objects by the offsets of their slots, and how messages are queued
   at a link.

   Objects are reached only after their exact type has been seen; `find_slots` looks the offsets up, once. */

#ifndef BROKER_NATIVE_H
#define BROKER_NATIVE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stddef.h>
#include <stdint.h>

#define HIDDEN __attribute__((visibility("hidden")))

extern HIDDEN PyTypeObject *asked_type, *answered_type, *body_type, *call_type, *end_type, *attempt_type, *request_type,
    *options_type, *session_type;
extern HIDDEN PyObject *ended_ok;
extern HIDDEN Py_ssize_t body_raw, body_attachments, attempt_id, attempt_request, attempt_mark, request_options,
    options_timeout, options_meta, options_idempotent, options_key, options_idle, session_link;
extern HIDDEN PyTypeObject MatcherType, FeederType;

typedef struct {
    PyTypeObject **type;
    const char *name;
    Py_ssize_t *offset;
} Slot;

/* What stands in a slot, borrowed; NULL if nothing does. */
static inline PyObject *at(PyObject *object, Py_ssize_t offset)
{
    return *(PyObject **)((char *)object + offset);
}

static inline void put(PyObject *object, Py_ssize_t offset, PyObject *value)
{
    PyObject **slot = (PyObject **)((char *)object + offset), *before = *slot;
    *slot = Py_NewRef(value);
    Py_XDECREF(before);
}

static inline int is(PyObject *object, PyTypeObject *type)
{
    return object != NULL && Py_TYPE(object) == type;
}

/* A number that stands in a slot; -1 if none does, or one that is below 0 or above what fits. Sets no error. */
static inline Py_ssize_t count_at(PyObject *object, Py_ssize_t offset)
{
    PyObject *number = at(object, offset);
    if (number == NULL || !PyLong_CheckExact(number))
        return -1;
    int overflow;
    long long value = PyLong_AsLongLongAndOverflow(number, &overflow);
    return overflow || value < 0 || value > PY_SSIZE_T_MAX / 4 ? -1 : (Py_ssize_t)value;
}

/* Find the offsets; -1 with an ImportError if a name is no slot of its type. */
HIDDEN int find_slots(const Slot *slots, size_t count);

/* Add to a number that stands in a slot; -1 with an error. */
HIDDEN int bump(PyObject *object, Py_ssize_t offset, Py_ssize_t by);

/* Queue a plain call, or a plain result, at a session's link, as the engine has its peer deliver them; 0 if that is left
   to Python, -1 with an error. */
HIDDEN int deliver_call(PyObject *session, PyObject *attempt, PyObject *endpoint, PyObject *method, PyObject *body,
                        double left_s);
HIDDEN int deliver_result(PyObject *session, PyObject *wire_id, PyObject *body, PyObject *meta);

/* know_core(…): the types of the tables; in _native_matcher.c. */
HIDDEN PyObject *know_core(PyObject *module, PyObject *const *args, Py_ssize_t count);

#endif
