/* The way of a plain request through the router's tables, in C: taken in, given to a worker, answered, ended.

   A Matcher does for `Asked` and `Answered` what `Requests.asked` and `Requests.answered` of `core.requests` do, in the
   same tables, where nothing stands in the way: a worker is free, no bound is reached, no key, no stream, no attachment,
   no timing. It looks at all of that before it changes anything; whatever is not plain goes to the Python handler as if
   there were no Matcher. So every rule, every refusal and every other outcome stands in Python alone.

   What a request leads to is queued at the peer's link at once, if that is plain too and nothing else waits to be done
   before it; else it is appended to `effects`, as by Python. */

#include "_native.h"
#include <limits.h>

static PyTypeObject *state_type, *pending_type, *deadlines_type, *counters_type, *budget_type, *registration_type,
    *endpoint_type, *least_type, *queue_type, *deliver_type;

static Py_ssize_t state_draining, state_limits, pending_count, pending_requests, pending_attempts, deadlines_per_slot,
    deadlines_last_slot, deadlines_last, counters_accepted, counters_attempts, counters_ended, counters_latency, counters_sum,
    budget_used, session_requests, session_roles, session_attempts, session_congested, session_draining, registration_session,
    registration_endpoint, registration_methods, registration_capacity, registration_load, registration_free,
    registration_gone, endpoint_name, endpoint_registrations, endpoint_deadline, endpoint_deadline_max, endpoint_free,
    endpoint_queue, least_levels, least_lowest, least_size, queue_size, asked_session, asked_wire_id, asked_endpoint,
    asked_method, asked_body, asked_options, answered_session, answered_attempt, answered_body, answered_error,
    attempt_registration, attempt_state, request_session, request_wire_id, request_accepted, request_slot, request_state,
    request_the_attempt, request_attempts, request_stream, request_held, request_work, options_timing, deadlines_earliest;

static Py_ssize_t levels_max, small_bytes;

typedef struct {
    PyObject_HEAD
    PyObject *requests; /* core.requests.Requests, for what is left to it in part */
    PyObject *state, *pending, *deadlines, *counters, *budget, *by_name, *effects;
    PyObject *asked, *answered; /* the handlers in Python */
    PyObject *assigned, *ended, *done, *ok, *one;
    PyObject *limits; /* whose bounds these are: */
    Py_ssize_t in_flight_max, soft_bytes;
    PyObject *deadline; /* of the last request */
    long caller; /* the bit of the role */
    char plain; /* whether they are numbers, and there is none for the rate */
} Matcher;

/* ------------------------------------------------------------------ small things */

static inline int is_dict(PyObject *object)
{
    return object != NULL && PyDict_CheckExact(object);
}

/* A payload without attachments: its size in bytes; -1 if it is none. */
static Py_ssize_t plain_size(PyObject *body)
{
    PyObject *attachments, *raw;
    if (!is(body, body_type) || (attachments = at(body, body_attachments)) == NULL || !PyTuple_CheckExact(attachments)
        || PyTuple_GET_SIZE(attachments) || (raw = at(body, body_raw)) == NULL)
        return -1;
    if (PyBytes_CheckExact(raw))
        return PyBytes_GET_SIZE(raw);
    Py_ssize_t size = PyObject_Size(raw);
    if (size < 0)
        PyErr_Clear();
    return size;
}

/* A time in seconds, which may be written as an integer; -1 if it is none. */
static double seconds(PyObject *number)
{
    if (number != NULL && PyFloat_CheckExact(number))
        return PyFloat_AS_DOUBLE(number);
    if (number == NULL || !PyLong_CheckExact(number))
        return -1;
    double value = PyLong_AsDouble(number);
    if (value == -1.0 && PyErr_Occurred())
        PyErr_Clear();
    return value;
}

/* Look up a number in a dict of names; -1 if it is not there. */
static long number_of(PyObject *dict, PyObject *name)
{
    PyObject *number = PyDict_GetItemWithError(dict, name);
    if (number == NULL || !PyLong_CheckExact(number)) {
        PyErr_Clear();
        return -1;
    }
    int overflow;
    return PyLong_AsLongAndOverflow(number, &overflow);
}

/* Append Deliver(session, message) to the effects; steals the message, which may be NULL with an error. */
static int add_effect(Matcher *self, PyObject *session, PyObject *message)
{
    if (message == NULL)
        return -1;
    PyObject *values[2] = {session, message}, *effect = PyObject_Vectorcall((PyObject *)deliver_type, values, 2, NULL);
    Py_DECREF(message);
    int added = effect == NULL ? -1 : PyList_Append(self->effects, effect);
    Py_XDECREF(effect);
    return added;
}

/* ------------------------------------------------------------------ least pending */

/* The level of a load, borrowed; NULL if there is none yet. */
static PyObject *level_of(PyObject *levels, Py_ssize_t load)
{
    Py_ssize_t index = load < levels_max ? load : levels_max;
    return index < PyList_GET_SIZE(levels) && is_dict(PyList_GET_ITEM(levels, index)) ? PyList_GET_ITEM(levels, index) : NULL;
}

/* The first of the least loaded, borrowed, if it may take this method and is not beyond the levels; NULL if the policy has
   to look closer. `load` is what it has then; `lowest` where it stands now. */
static PyObject *first_of(PyObject *policy, PyObject *method, Py_ssize_t *load, Py_ssize_t *lowest)
{
    PyObject *levels = at(policy, least_levels), *level, *registration, *methods;
    Py_ssize_t index = count_at(policy, least_lowest), position = 0;
    if (count_at(policy, least_size) <= 0 || levels == NULL || !PyList_CheckExact(levels) || index < 0)
        return NULL;
    for (;; index++) {
        if (index >= PyList_GET_SIZE(levels) || !is_dict(level = PyList_GET_ITEM(levels, index)))
            return NULL;
        if (PyDict_GET_SIZE(level))
            break;
    }
    if (!PyDict_Next(level, &position, &registration, NULL) || !is(registration, registration_type)
        || at(registration, registration_free) != Py_True || (methods = at(registration, registration_methods)) == NULL)
        return NULL;
    if (methods != Py_None) {
        int there = PyFrozenSet_CheckExact(methods) ? PySet_Contains(methods, method) : 0;
        if (there < 0)
            PyErr_Clear();
        if (there <= 0)
            return NULL;
    }
    *load = count_at(registration, registration_load) + 1;
    *lowest = index;
    /* One that is full then leaves the levels. */
    Py_ssize_t capacity = count_at(registration, registration_capacity);
    if (*load < 1 || *load > capacity || (*load < capacity && level_of(levels, *load) == NULL))
        return NULL;
    return registration;
}

/* As LeastPending.take, of what `first_of` has found. */
static int take(PyObject *policy, PyObject *registration, Py_ssize_t load, Py_ssize_t lowest)
{
    PyObject *levels = at(policy, least_levels), *number = PyLong_FromSsize_t(lowest);
    if (number == NULL)
        return -1;
    put(policy, least_lowest, number);
    Py_SETREF(number, PyLong_FromSsize_t(load));
    if (number == NULL)
        return -1;
    int failed;
    if (load >= count_at(registration, registration_capacity)) {
        put(registration, registration_free, Py_False);
        failed = PyDict_DelItem(PyList_GET_ITEM(levels, lowest), registration) < 0 || bump(policy, least_size, -1) < 0;
    } else {
        failed = PyDict_DelItem(PyList_GET_ITEM(levels, lowest), registration) < 0
                 || PyDict_SetItem(level_of(levels, load), registration, Py_None) < 0;
    }
    put(registration, registration_load, number);
    Py_DECREF(number);
    return failed ? -1 : 0;
}

/* As Registry.unload, where the policy is the common one; 1 if it was done, 0 if it is left to Python. */
static int unload(PyObject *registration, PyObject *endpoint)
{
    PyObject *policy = at(endpoint, endpoint_free), *levels, *session = at(registration, registration_session);
    Py_ssize_t load = count_at(registration, registration_load), lowest;
    if (!is(policy, least_type) || load < 1 || (levels = at(policy, least_levels)) == NULL || !PyList_CheckExact(levels)
        || (lowest = count_at(policy, least_lowest)) < 0 || level_of(levels, load - 1) == NULL)
        return 0;
    int free = at(registration, registration_free) == Py_True;
    if (free ? level_of(levels, load) == NULL
             : load - 1 >= count_at(registration, registration_capacity) || at(registration, registration_gone) != Py_False
                   || !is(session, session_type) || at(session, session_congested) != Py_False
                   || at(session, session_draining) != Py_False)
        return 0; /* not in the levels, nor willing to be */
    PyObject *number = PyLong_FromSsize_t(load - 1);
    if (number == NULL)
        return -1;
    put(registration, registration_load, number);
    if (load - 1 < lowest) /* a level below the last one */
        put(policy, least_lowest, number);
    Py_DECREF(number);
    if (free ? PyDict_DelItem(level_of(levels, load), registration) < 0 : bump(policy, least_size, 1) < 0)
        return -1;
    put(registration, registration_free, Py_True);
    return PyDict_SetItem(level_of(levels, load - 1), registration, Py_None) < 0 ? -1 : 1;
}

/* ------------------------------------------------------------------ asked */

/* Look up bounds that have been replaced; -1 with an error. */
static int know_limits(Matcher *self, PyObject *limits)
{
    PyObject *in_flight = PyObject_GetAttrString(limits, "in_flight_max"),
             *soft = in_flight ? PyObject_GetAttrString(limits, "memory_soft_bytes") : NULL,
             *rate = soft ? PyObject_GetAttrString(limits, "requests_per_s") : NULL;
    int rated = rate ? PyObject_IsTrue(rate) : -1;
    if (rated >= 0) {
        self->in_flight_max = PyLong_CheckExact(in_flight) ? PyLong_AsSsize_t(in_flight) : -1;
        self->soft_bytes = PyLong_CheckExact(soft) ? PyLong_AsSsize_t(soft) : -1;
        PyErr_Clear(); /* what is no number, or too large a one, is -1: then nothing is plain */
        self->plain = !rated && self->in_flight_max >= 0 && self->soft_bytes >= 0;
        Py_XSETREF(self->limits, Py_NewRef(limits));
    }
    Py_XDECREF(in_flight);
    Py_XDECREF(soft);
    Py_XDECREF(rate);
    return rated < 0 ? -1 : 0;
}

/* What a plain request needs, all borrowed. */
typedef struct {
    PyObject *session, *wire_id, *endpoint, *method, *body, *options, *requests, *policy, *registration, *worker, *attempts;
    Py_ssize_t load, lowest, size;
    double timeout;
} Plan;

/* Whether its caller may ask now: nothing of what `Requests.asked` refuses is there. -1 with an error. */
static int may_ask(Matcher *self, PyObject *event, Plan *plan)
{
    PyObject *session = plan->session = at(event, asked_session), *wire_id = plan->wire_id = at(event, asked_wire_id),
             *state = self->state, *limits = at(state, state_limits), *roles;
    if (!is(session, session_type) || wire_id == NULL
        || !(PyBytes_CheckExact(wire_id) || PyLong_CheckExact(wire_id) || PyUnicode_CheckExact(wire_id))
        || at(session, session_link) == NULL || at(session, session_link) == Py_None
        || !is_dict(plan->requests = at(session, session_requests)) || !is_dict(roles = at(session, session_roles))
        || at(state, state_draining) != Py_False || limits == NULL)
        return 0;
    if (limits != self->limits && know_limits(self, limits) < 0)
        return -1;
    Py_ssize_t used = count_at(self->budget, budget_used);
    long bits = number_of(roles, at(event, asked_endpoint));
    if (!self->plain || PyDict_GET_SIZE(plan->requests) >= self->in_flight_max || used < 0 || used > self->soft_bytes || bits < 0
        || !(bits & self->caller))
        return 0;
    int there = PyDict_Contains(plan->requests, wire_id);
    return there < 0 ? -1 : !there;
}

/* Whether a worker takes it now, for a time that is right. -1 with an error. */
static int may_go(Matcher *self, PyObject *event, Plan *plan)
{
    PyObject *options = plan->options = at(event, asked_options), *body = plan->body = at(event, asked_body),
             *method = plan->method = at(event, asked_method), *registrations, *timeout;
    if (!is(options, options_type) || (plan->size = plain_size(body)) < 0 || method == NULL || !PyUnicode_CheckExact(method)
        || at(options, options_key) != Py_None || at(options, options_idle) != Py_None)
        return 0;
    PyObject *endpoint = plan->endpoint = PyDict_GetItemWithError(self->by_name, at(event, asked_endpoint));
    if (endpoint == NULL)
        return PyErr_Occurred() ? -1 : 0;
    if (!is(endpoint, endpoint_type) || !is_dict(registrations = at(endpoint, endpoint_registrations))
        || PyDict_GET_SIZE(registrations) == 0 || !is(plan->policy = at(endpoint, endpoint_free), least_type)
        || (timeout = at(options, options_timeout)) == NULL || at(endpoint, endpoint_name) == NULL)
        return 0;
    plan->timeout = seconds(timeout == Py_None ? at(endpoint, endpoint_deadline) : timeout);
    if (!(plan->timeout > 0 && plan->timeout < 1e9)
        || (timeout != Py_None && !(plan->timeout <= seconds(at(endpoint, endpoint_deadline_max)))))
        return 0;
    plan->registration = first_of(plan->policy, method, &plan->load, &plan->lowest);
    return plan->registration != NULL && is(plan->worker = at(plan->registration, registration_session), session_type)
           && is_dict(plan->attempts = at(plan->worker, session_attempts));
}

/* The slot of a deadline, with the request in it, a new reference: as Deadlines.add. */
static PyObject *add_deadline(Matcher *self, PyObject *request, double due_at, PyObject *deadline)
{
    static PyObject *add;
    PyObject *deadlines = self->deadlines, *per_slot = at(deadlines, deadlines_per_slot), *last = at(deadlines, deadlines_last);
    double slot = per_slot && PyFloat_CheckExact(per_slot) ? due_at * PyFloat_AS_DOUBLE(per_slot) : -1.0;
    if (slot >= 0 && slot < (double)(PY_SSIZE_T_MAX / 4)
        && (Py_ssize_t)slot + 1 == count_at(deadlines, deadlines_last_slot) && is_dict(last))
        return PyDict_SetItem(last, request, Py_None) < 0 ? NULL : Py_NewRef(last);
    if (add == NULL && (add = PyUnicode_InternFromString("add")) == NULL)
        return NULL;
    PyObject *arguments[3] = {deadlines, request, deadline};
    return PyObject_VectorcallMethod(add, arguments, 3, NULL);
}

/* Put a request and its attempt into the tables, as Pending.open and open_attempt; -1 with an error. */
static int open_both(Matcher *self, const Plan *plan, PyObject *request, PyObject *attempt, double due_at, PyObject *deadline)
{
    PyObject *slot = add_deadline(self, request, due_at, deadline), *number = at(attempt, attempt_id);
    if (slot == NULL)
        return -1;
    put(request, request_slot, slot);
    Py_DECREF(slot);
    if (PyDict_SetItem(plan->requests, plan->wire_id, request) < 0 || bump(self->pending, pending_count, 1) < 0
        || PyDict_SetItem(plan->attempts, number, attempt) < 0)
        return -1;
    put(request, request_the_attempt, attempt);
    put(request, request_attempts, self->one);
    put(request, request_state, self->assigned);
    if (plan->size > small_bytes
        && (bump(request, request_held, plan->size) < 0 || bump(self->budget, budget_used, plan->size) < 0))
        return -1;
    return bump(self->counters, counters_accepted, 1) < 0 || bump(self->counters, counters_attempts, 1) < 0 ? -1 : 0;
}

/* What came of queueing a message at once: if that failed, the engine tries again, which closes the link that is at fault and
   no other. What ends programs comes through. */
static int left_to_engine(int queued)
{
    if (queued >= 0 || !PyErr_ExceptionMatches(PyExc_Exception))
        return queued;
    PyErr_Clear();
    return 0;
}

/* Tell the worker. */
static int call(Matcher *self, const Plan *plan, PyObject *attempt, double left_s)
{
    PyObject *name = at(plan->endpoint, endpoint_name);
    if (PyList_GET_SIZE(self->effects) == 0) {
        int queued = left_to_engine(deliver_call(plan->worker, attempt, name, plan->method, plan->body, left_s));
        if (queued)
            return queued < 0 ? -1 : 0;
    }
    PyObject *left = PyFloat_FromDouble(left_s);
    if (left == NULL)
        return -1;
    PyObject *values[5] = {attempt, name, plan->method, plan->body, left};
    int added = add_effect(self, plan->worker, PyObject_Vectorcall((PyObject *)call_type, values, 5, NULL));
    Py_DECREF(left);
    return added;
}

/* The numbers of a request and of its attempt: as long as they are the same, one object, so that a request that has waited
   long has one less that no cache holds. With a million pending, 0.2 µs. */
static int next_numbers(PyObject *pending)
{
    if (bump(pending, pending_requests, 1) < 0)
        return -1;
    if (count_at(pending, pending_attempts) + 1 != count_at(pending, pending_requests))
        return bump(pending, pending_attempts, 1);
    put(pending, pending_attempts, at(pending, pending_requests));
    return 0;
}

/* A deadline, a new reference: for the same reason the last one, if it is the same. */
static PyObject *deadline_of(Matcher *self, double due_at)
{
    if (self->deadline == NULL || PyFloat_AS_DOUBLE(self->deadline) != due_at) {
        PyObject *deadline = PyFloat_FromDouble(due_at);
        if (deadline == NULL)
            return NULL;
        Py_XSETREF(self->deadline, deadline);
    }
    return Py_NewRef(self->deadline);
}

/* Take a request in and give it to a worker: 1. 0: nothing has changed, Python shall judge it. -1 with an error. */
static int take_in(Matcher *self, PyObject *event, PyObject *now)
{
    Plan plan;
    int plain = is(event, asked_type) && PyFloat_CheckExact(now) ? may_ask(self, event, &plan) : 0;
    if (plain > 0)
        plain = may_go(self, event, &plan);
    if (plain <= 0)
        return plain;
    double due_at = PyFloat_AS_DOUBLE(now) + plan.timeout;
    PyObject *deadline = deadline_of(self, due_at), *request = NULL, *attempt = NULL;
    int done = -1;
    if (deadline == NULL || next_numbers(self->pending) < 0)
        goto end;
    PyObject *values[9] = {at(self->pending, pending_requests), plan.session, plan.wire_id, plan.endpoint, plan.method,
                           plan.body, plan.options, now, deadline};
    if ((request = PyObject_Vectorcall((PyObject *)request_type, values, 9, NULL)) == NULL)
        goto end;
    PyObject *own[4] = {at(self->pending, pending_attempts), request, plan.registration, now};
    if ((attempt = PyObject_Vectorcall((PyObject *)attempt_type, own, 4, NULL)) == NULL)
        goto end;
    if (take(plan.policy, plan.registration, plan.load, plan.lowest) < 0
        || open_both(self, &plan, request, attempt, due_at, deadline) < 0
        || call(self, &plan, attempt, due_at - PyFloat_AS_DOUBLE(now)) < 0)
        goto end;
    done = 1;
end:
    Py_XDECREF(deadline);
    Py_XDECREF(request);
    Py_XDECREF(attempt);
    return done;
}

/* ------------------------------------------------------------------ answered */

/* The books in which an end is counted, borrowed, and where. */
typedef struct {
    PyObject *ended, *latency;
    long ends;
    double sum_s;
    Py_ssize_t bucket;
} Books;

/* Look at the books; 0 if they are not as Counters makes them. */
static int open_books(Matcher *self, double elapsed_s, Books *books)
{
    PyObject *sum = at(self->counters, counters_sum), *count;
    books->ended = at(self->counters, counters_ended);
    books->latency = at(self->counters, counters_latency);
    if (!is_dict(books->ended) || sum == NULL || !PyFloat_CheckExact(sum) || books->latency == NULL
        || !PyList_CheckExact(books->latency) || PyList_GET_SIZE(books->latency) == 0)
        return 0;
    books->sum_s = PyFloat_AS_DOUBLE(sum);
    books->bucket = 0;
    for (unsigned long long us = elapsed_s < 1e12 ? (unsigned long long)(elapsed_s * 1e6) : ULLONG_MAX; us; us >>= 1)
        books->bucket++;
    if (books->bucket >= PyList_GET_SIZE(books->latency))
        books->bucket = PyList_GET_SIZE(books->latency) - 1;
    count = PyList_GET_ITEM(books->latency, books->bucket);
    books->ends = number_of(books->ended, self->ok);
    return PyLong_CheckExact(count) && books->ends >= 0;
}

/* Count an end, as Counters.end. */
static int count_end(Matcher *self, const Books *books, double elapsed_s)
{
    PyObject *number = PyLong_FromLong(books->ends + 1);
    int failed = number == NULL || PyDict_SetItem(books->ended, self->ok, number) < 0;
    Py_XDECREF(number);
    if (failed || (number = PyFloat_FromDouble(books->sum_s + elapsed_s)) == NULL)
        return -1;
    put(self->counters, counters_sum, number);
    Py_DECREF(number);
    long long count = PyLong_AsLongLong(PyList_GET_ITEM(books->latency, books->bucket));
    if ((count == -1 && PyErr_Occurred()) || (number = PyLong_FromLongLong(count + 1)) == NULL)
        return -1;
    return PyList_SetItem(books->latency, books->bucket, number);
}

/* Take a request and its attempt out of the tables, as Pending.close. */
static int close_both(Matcher *self, PyObject *request, PyObject *attempt, PyObject *requests, PyObject *attempts)
{
    PyObject *slot = at(request, request_slot);
    put(request, request_state, self->ended);
    if (PyDict_DelItem(requests, at(request, request_wire_id)) < 0)
        return -1;
    put(attempt, attempt_state, self->done);
    put(request, request_the_attempt, Py_None);
    if (PyDict_DelItem(attempts, at(attempt, attempt_id)) < 0)
        return -1;
    if (slot != Py_None) {
        if (PyDict_DelItem(slot, request) < 0)
            return -1;
        if (PyDict_GET_SIZE(slot) == 0)
            PyDict_Clear(slot); /* an emptied dict keeps the room it had at its fullest */
        put(request, request_slot, Py_None);
    }
    Py_ssize_t held = count_at(request, request_held);
    if (held > 0 && (bump(request, request_held, -held) < 0 || bump(self->budget, budget_used, -held) < 0))
        return -1;
    return bump(self->pending, pending_count, -1);
}

/* Tell the caller, if it is there. */
static int tell(Matcher *self, PyObject *caller, PyObject *wire_id, PyObject *body, PyObject *meta)
{
    PyObject *link = at(caller, session_link);
    if (link == NULL || link == Py_None)
        return 0;
    if (PyList_GET_SIZE(self->effects) == 0) {
        int queued = left_to_engine(deliver_result(caller, wire_id, body, meta));
        if (queued)
            return queued < 0 ? -1 : 0;
    }
    PyObject *values[4] = {wire_id, ended_ok, body, meta};
    return add_effect(self, caller, PyObject_Vectorcall((PyObject *)end_type, values, 4, NULL));
}

/* A place is free, as Requests._free. */
static int release(Matcher *self, PyObject *registration, PyObject *endpoint, PyObject *now)
{
    static PyObject *free_name, *feed;
    if ((free_name == NULL && (free_name = PyUnicode_InternFromString("_free")) == NULL)
        || (feed == NULL && (feed = PyUnicode_InternFromString("feed")) == NULL))
        return -1;
    PyObject *queue = at(endpoint, endpoint_queue), *arguments[3] = {self->requests, registration, now};
    int waits = !is(queue, queue_type) || count_at(queue, queue_size) != 0, unloaded = unload(registration, endpoint);
    if (unloaded < 0 || (unloaded && !waits))
        return unloaded < 0 ? -1 : 0;
    PyObject *done = PyObject_VectorcallMethod(unloaded ? feed : free_name, arguments, 3, NULL);
    Py_XDECREF(done);
    return done ? 0 : -1;
}

/* How a reply came about, a new reference; None where its caller did not ask. */
static PyObject *meta_of(Matcher *self, PyObject *request, int wanted, PyObject *worker, PyObject *now)
{
    static PyObject *name;
    if (!wanted)
        return Py_NewRef(Py_None);
    if (name == NULL && (name = PyUnicode_InternFromString("_reply_meta")) == NULL)
        return NULL;
    PyObject *arguments[6] = {self->requests, request, ended_ok, now, worker, Py_None};
    return PyObject_VectorcallMethod(name, arguments, 6, NULL);
}

/* End a request by its worker's result: 1. 0: nothing has changed, Python shall judge it. -1 with an error. */
static int match(Matcher *self, PyObject *event, PyObject *now)
{
    PyObject *worker, *number, *attempts, *attempt, *request, *registration, *endpoint, *options, *caller, *requests, *slot,
        *accepted_at, *body, *told;
    Books books;
    if (!is(event, answered_type) || !PyFloat_CheckExact(now) || at(event, answered_error) != Py_None
        || plain_size(body = at(event, answered_body)) < 0 || !is(worker = at(event, answered_session), session_type)
        || (number = at(event, answered_attempt)) == NULL || !PyLong_CheckExact(number)
        || !is_dict(attempts = at(worker, session_attempts)))
        return 0;
    if ((attempt = PyDict_GetItemWithError(attempts, number)) == NULL)
        return PyErr_Occurred() ? -1 : 0;
    if (!is(attempt, attempt_type) || !is(request = at(attempt, attempt_request), request_type)
        || !is(registration = at(attempt, attempt_registration), registration_type)
        || at(registration, registration_session) != worker || at(request, request_the_attempt) != attempt
        || !is(endpoint = at(registration, registration_endpoint), endpoint_type)
        || at(request, request_stream) != Py_None || at(request, request_work) != Py_None
        || !is(options = at(request, request_options), options_type) || at(options, options_timing) != Py_False
        || ((told = at(options, options_meta)) != Py_True && told != Py_False)
        || !is(caller = at(request, request_session), session_type) || !is_dict(requests = at(caller, session_requests))
        || (slot = at(request, request_slot)) == NULL || !(slot == Py_None || is_dict(slot))
        || (accepted_at = at(request, request_accepted)) == NULL || !PyFloat_CheckExact(accepted_at)
        || PyFloat_AS_DOUBLE(now) < PyFloat_AS_DOUBLE(accepted_at) || count_at(request, request_held) < 0)
        return 0;
    double elapsed_s = PyFloat_AS_DOUBLE(now) - PyFloat_AS_DOUBLE(accepted_at);
    if (!open_books(self, elapsed_s, &books))
        return 0;
    /* From here on Python may run: what is used is held by the event, the attempt and the request. */
    Py_INCREF(attempt);
    Py_INCREF(request);
    PyObject *meta = NULL;
    int done = -1;
    if (close_both(self, request, attempt, requests, attempts) == 0 && count_end(self, &books, elapsed_s) == 0
        && (meta = meta_of(self, request, told == Py_True && at(caller, session_link) != Py_None, worker, now)) != NULL
        && tell(self, caller, at(request, request_wire_id), body, meta) == 0 && release(self, registration, endpoint, now) == 0)
        done = 1;
    Py_DECREF(attempt);
    Py_DECREF(request);
    Py_XDECREF(meta);
    return done;
}

/* ------------------------------------------------------------------ Matcher */

static PyObject *handled(int done, PyObject *handler, PyObject *const *args)
{
    if (done == 0 && handler == NULL)
        PyErr_SetString(PyExc_RuntimeError, "this router is gone");
    if (done < 0 || (done == 0 && handler == NULL))
        return NULL;
    return done ? Py_NewRef(Py_None) : PyObject_Vectorcall(handler, args, 2, NULL);
}

static PyObject *Matcher_asked(Matcher *self, PyObject *const *args, Py_ssize_t count)
{
    if (count != 2) {
        PyErr_SetString(PyExc_TypeError, "asked(event: Asked, now: float)");
        return NULL;
    }
    return handled(take_in(self, args[0], args[1]), self->asked, args);
}

static PyObject *Matcher_answered(Matcher *self, PyObject *const *args, Py_ssize_t count)
{
    if (count != 2) {
        PyErr_SetString(PyExc_TypeError, "answered(event: Answered, now: float)");
        return NULL;
    }
    return handled(match(self, args[0], args[1]), self->answered, args);
}

static int Matcher_traverse(Matcher *self, visitproc visit, void *arg)
{
    Py_VISIT(self->requests);
    Py_VISIT(self->state);
    Py_VISIT(self->pending);
    Py_VISIT(self->deadlines);
    Py_VISIT(self->counters);
    Py_VISIT(self->budget);
    Py_VISIT(self->by_name);
    Py_VISIT(self->effects);
    Py_VISIT(self->asked);
    Py_VISIT(self->answered);
    return 0;
}

static int Matcher_clear(Matcher *self)
{
    Py_CLEAR(self->requests);
    Py_CLEAR(self->asked);
    Py_CLEAR(self->answered);
    return 0; /* the tables stay until the end: methods need not ask whether they are there */
}

static void Matcher_dealloc(Matcher *self)
{
    PyObject_GC_UnTrack(self);
    Matcher_clear(self);
    PyObject **rest[] = {&self->state, &self->pending, &self->deadlines, &self->counters, &self->budget, &self->by_name,
                         &self->effects, &self->assigned, &self->ended, &self->done, &self->ok, &self->one, &self->limits,
                         &self->deadline};
    for (size_t i = 0; i < sizeof(rest) / sizeof(*rest); i++) Py_CLEAR(*rest[i]);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

/* Get an attribute of an exact type, by its path; 0 with an error. */
static int get(PyObject *from, const char *name, PyTypeObject *type, PyObject **to)
{
    *to = PyObject_GetAttrString(from, name);
    if (*to == NULL)
        return 0;
    if (type == NULL || is(*to, type))
        return 1;
    PyErr_Format(PyExc_TypeError, "%s is no %s", name, type->tp_name);
    return 0;
}

static PyObject *Matcher_new(PyTypeObject *type, PyObject *args, PyObject *named)
{
    static char *names[] = {"requests", "asked", "answered", "assigned", "ended", "done", "caller", "ok", NULL};
    PyObject *requests, *asked, *answered, *assigned, *ended, *done, *ok, *registry = NULL;
    long caller;
    if (state_type == NULL) {
        PyErr_SetString(PyExc_RuntimeError, "know_core comes first");
        return NULL;
    }
    if (!PyArg_ParseTupleAndKeywords(args, named, "OOOOOOlU", names, &requests, &asked, &answered, &assigned, &ended, &done,
                                     &caller, &ok))
        return NULL;
    Matcher *self = (Matcher *)type->tp_alloc(type, 0);
    if (self == NULL)
        return NULL;
    self->requests = Py_NewRef(requests);
    self->asked = Py_NewRef(asked);
    self->answered = Py_NewRef(answered);
    self->assigned = Py_NewRef(assigned);
    self->ended = Py_NewRef(ended);
    self->done = Py_NewRef(done);
    self->ok = Py_NewRef(ok);
    self->caller = caller;
    int found = (self->one = PyLong_FromLong(1)) != NULL && get(requests, "state", state_type, &self->state)
                && get(self->state, "pending", pending_type, &self->pending)
                && get(self->pending, "deadlines", deadlines_type, &self->deadlines)
                && get(self->state, "counters", counters_type, &self->counters)
                && get(self->state, "budget", budget_type, &self->budget)
                && get(self->state, "registry", NULL, &registry) && get(registry, "by_name", NULL, &self->by_name)
                && get(self->state, "effects", &PyList_Type, &self->effects);
    Py_XDECREF(registry);
    if (found && !PyDict_Check(self->by_name)) {
        PyErr_SetString(PyExc_TypeError, "by_name is no dict");
        found = 0;
    }
    if (!found)
        Py_CLEAR(self);
    return (PyObject *)self;
}

static PyMethodDef Matcher_methods[] = {
    {"asked", (PyCFunction)(void (*)(void))Matcher_asked, METH_FASTCALL,
     "asked(event, now)\n--\n\nTake a request in; what is not plain goes to the handler in Python."},
    {"answered", (PyCFunction)(void (*)(void))Matcher_answered, METH_FASTCALL,
     "answered(event, now)\n--\n\nEnd a request by its worker's result; what is not plain goes to the handler in Python."},
    {NULL, NULL, 0, NULL},
};

PyTypeObject MatcherType = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "broker.wire._native.Matcher",
    .tp_doc = "Matcher(requests, asked, answered, assigned, ended, done, caller, ok)\n--\n\nTakes plain requests through the "
              "tables of one router.",
    .tp_basicsize = sizeof(Matcher),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .tp_new = Matcher_new,
    .tp_dealloc = (destructor)Matcher_dealloc,
    .tp_traverse = (traverseproc)Matcher_traverse,
    .tp_clear = (inquiry)Matcher_clear,
    .tp_methods = Matcher_methods,
};

/* ------------------------------------------------------------------ Feeder */

typedef struct {
    PyObject_HEAD
    PyObject *engine, *handlers, *effects, *deadlines, *expiry;
} Feeder;

static PyObject *now_name, *timer_at_name, *settle_name;

/* Whether there are effects to perform, or the timer has to go off earlier; -1 with an error. */
static int has_to_settle(Feeder *self)
{
    if (PyList_GET_SIZE(self->effects))
        return 1;
    PyObject *timer_at = PyObject_GetAttr(self->engine, timer_at_name), *pending = at(self->deadlines, deadlines_earliest),
             *expiry = at(self->expiry, deadlines_earliest);
    if (timer_at == NULL)
        return -1;
    int has = 1;
    if (PyFloat_CheckExact(timer_at) && pending && PyFloat_CheckExact(pending) && expiry && PyFloat_CheckExact(expiry)) {
        double due = PyFloat_AS_DOUBLE(timer_at);
        has = PyFloat_AS_DOUBLE(pending) < due || PyFloat_AS_DOUBLE(expiry) < due;
    }
    Py_DECREF(timer_at);
    return has;
}

/* Feed all events, as Engine.feed_all in Python. */
static PyObject *Feeder_call(Feeder *self, PyObject *args, PyObject *named)
{
    PyObject *events, *type = NULL, *error = NULL, *trace = NULL;
    if (named != NULL && PyDict_GET_SIZE(named)) {
        PyErr_SetString(PyExc_TypeError, "feed_all takes no names");
        return NULL;
    }
    if (!PyArg_ParseTuple(args, "O!:feed_all", &PyList_Type, &events))
        return NULL;
    if (self->engine == NULL) {
        PyErr_SetString(PyExc_RuntimeError, "this engine is gone");
        return NULL;
    }
    PyObject *now = PyObject_CallMethodNoArgs(self->engine, now_name);
    if (now == NULL)
        return NULL;
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(events); i++) {
        PyObject *arguments[2] = {Py_NewRef(PyList_GET_ITEM(events, i)), now},
                 *handler = PyDict_GetItemWithError(self->handlers, (PyObject *)Py_TYPE(arguments[0])), *done = NULL;
        if (handler) {
            Py_INCREF(handler);
            done = PyObject_Vectorcall(handler, arguments, 2, NULL);
            Py_DECREF(handler);
        } else if (!PyErr_Occurred()) {
            PyErr_SetObject(PyExc_KeyError, (PyObject *)Py_TYPE(arguments[0]));
        }
        Py_DECREF(arguments[0]);
        Py_XDECREF(done);
        if (done == NULL) {
            if (!PyErr_ExceptionMatches(PyExc_Exception)) { /* what ends programs goes before a fault */
                Py_CLEAR(type);
                Py_CLEAR(error);
                Py_CLEAR(trace);
                PyErr_Fetch(&type, &error, &trace);
                break;
            }
            if (type == NULL)
                PyErr_Fetch(&type, &error, &trace);
            else
                PyErr_Clear();
        }
    }
    Py_DECREF(now);
    int settle = has_to_settle(self);
    PyObject *settled = settle > 0 ? PyObject_CallMethodNoArgs(self->engine, settle_name) : NULL;
    Py_XDECREF(settled);
    if (settle < 0 || (settle && settled == NULL)) { /* an error of its own */
        Py_XDECREF(type);
        Py_XDECREF(error);
        Py_XDECREF(trace);
        return NULL;
    }
    if (type != NULL) {
        PyErr_Restore(type, error, trace);
        return NULL;
    }
    Py_RETURN_NONE;
}

static int Feeder_traverse(Feeder *self, visitproc visit, void *arg)
{
    Py_VISIT(self->engine);
    Py_VISIT(self->handlers);
    Py_VISIT(self->effects);
    Py_VISIT(self->deadlines);
    Py_VISIT(self->expiry);
    return 0;
}

static int Feeder_clear(Feeder *self)
{
    Py_CLEAR(self->engine);
    return 0;
}

static void Feeder_dealloc(Feeder *self)
{
    PyObject_GC_UnTrack(self);
    Feeder_clear(self);
    Py_CLEAR(self->handlers);
    Py_CLEAR(self->effects);
    Py_CLEAR(self->deadlines);
    Py_CLEAR(self->expiry);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyObject *Feeder_new(PyTypeObject *type, PyObject *args, PyObject *named)
{
    static char *names[] = {"engine", "handlers", "effects", "deadlines", "expiry", NULL};
    PyObject *engine, *handlers, *effects, *deadlines, *expiry;
    if (deadlines_type == NULL) {
        PyErr_SetString(PyExc_RuntimeError, "know_core comes first");
        return NULL;
    }
    if (!PyArg_ParseTupleAndKeywords(args, named, "OO!O!O!O!", names, &engine, &PyDict_Type, &handlers, &PyList_Type, &effects,
                                     deadlines_type, &deadlines, deadlines_type, &expiry)
        || (now_name == NULL && (now_name = PyUnicode_InternFromString("now")) == NULL)
        || (timer_at_name == NULL && (timer_at_name = PyUnicode_InternFromString("timer_at")) == NULL)
        || (settle_name == NULL && (settle_name = PyUnicode_InternFromString("settle")) == NULL))
        return NULL;
    Feeder *self = (Feeder *)type->tp_alloc(type, 0);
    if (self) {
        self->engine = Py_NewRef(engine);
        self->handlers = Py_NewRef(handlers);
        self->effects = Py_NewRef(effects);
        self->deadlines = Py_NewRef(deadlines);
        self->expiry = Py_NewRef(expiry);
    }
    return (PyObject *)self;
}

PyTypeObject FeederType = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "broker.wire._native.Feeder",
    .tp_doc = "Feeder(engine, handlers, effects, deadlines, expiry)\n--\n\nEngine.feed_all.",
    .tp_basicsize = sizeof(Feeder),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .tp_new = Feeder_new,
    .tp_dealloc = (destructor)Feeder_dealloc,
    .tp_traverse = (traverseproc)Feeder_traverse,
    .tp_clear = (inquiry)Feeder_clear,
    .tp_call = (ternaryfunc)Feeder_call,
};

/* know_core(types: tuple, levels_max: int, small_bytes: int) */
PyObject *know_core(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t count)
{
    PyTypeObject **types[] = {&session_type, &state_type, &pending_type, &deadlines_type, &counters_type, &budget_type,
                              &registration_type, &endpoint_type, &least_type, &queue_type, &deliver_type};
    const Py_ssize_t known = sizeof(types) / sizeof(*types);
    static const Slot slots[] = {
        {&state_type, "draining", &state_draining}, {&state_type, "limits", &state_limits},
        {&pending_type, "count", &pending_count}, {&pending_type, "requests_made", &pending_requests},
        {&pending_type, "attempts_made", &pending_attempts}, {&deadlines_type, "_per_slot", &deadlines_per_slot},
        {&deadlines_type, "_last_slot", &deadlines_last_slot}, {&deadlines_type, "_last", &deadlines_last},
        {&deadlines_type, "earliest", &deadlines_earliest},
        {&counters_type, "accepted", &counters_accepted}, {&counters_type, "attempts", &counters_attempts},
        {&counters_type, "ended", &counters_ended}, {&counters_type, "latency", &counters_latency},
        {&counters_type, "latency_sum_s", &counters_sum}, {&budget_type, "used", &budget_used},
        {&session_type, "link", &session_link}, {&session_type, "requests", &session_requests},
        {&session_type, "roles", &session_roles}, {&session_type, "attempts", &session_attempts},
        {&session_type, "congested", &session_congested}, {&session_type, "draining", &session_draining},
        {&registration_type, "session", &registration_session}, {&registration_type, "endpoint", &registration_endpoint},
        {&registration_type, "methods", &registration_methods}, {&registration_type, "capacity", &registration_capacity},
        {&registration_type, "load", &registration_load}, {&registration_type, "free", &registration_free},
        {&registration_type, "gone", &registration_gone}, {&endpoint_type, "name", &endpoint_name},
        {&endpoint_type, "registrations", &endpoint_registrations}, {&endpoint_type, "deadline_s", &endpoint_deadline},
        {&endpoint_type, "deadline_max_s", &endpoint_deadline_max}, {&endpoint_type, "free", &endpoint_free},
        {&endpoint_type, "queue", &endpoint_queue}, {&least_type, "_levels", &least_levels},
        {&least_type, "_lowest", &least_lowest}, {&least_type, "_size", &least_size}, {&queue_type, "_size", &queue_size},
        {&asked_type, "session", &asked_session}, {&asked_type, "wire_id", &asked_wire_id},
        {&asked_type, "endpoint", &asked_endpoint}, {&asked_type, "method", &asked_method},
        {&asked_type, "body", &asked_body}, {&asked_type, "options", &asked_options},
        {&answered_type, "session", &answered_session}, {&answered_type, "attempt", &answered_attempt},
        {&answered_type, "body", &answered_body}, {&answered_type, "error", &answered_error},
        {&attempt_type, "registration", &attempt_registration}, {&attempt_type, "state", &attempt_state},
        {&request_type, "session", &request_session}, {&request_type, "wire_id", &request_wire_id},
        {&request_type, "accepted_at", &request_accepted}, {&request_type, "slot", &request_slot},
        {&request_type, "state", &request_state}, {&request_type, "attempt", &request_the_attempt},
        {&request_type, "attempts", &request_attempts}, {&request_type, "stream", &request_stream},
        {&request_type, "held", &request_held}, {&request_type, "work", &request_work},
        {&options_type, "timing", &options_timing},
    };
    if (count != 3 || asked_type == NULL || !PyTuple_CheckExact(args[0]) || PyTuple_GET_SIZE(args[0]) != known) {
        PyErr_SetString(PyExc_TypeError, "know_core(types: tuple, levels_max: int, small_bytes: int), after know");
        return NULL;
    }
    levels_max = PyLong_AsSsize_t(args[1]);
    small_bytes = PyLong_AsSsize_t(args[2]);
    if (PyErr_Occurred())
        return NULL;
    for (Py_ssize_t i = 0; i < known; i++) {
        PyObject *given = PyTuple_GET_ITEM(args[0], i);
        if (!PyType_Check(given)) {
            PyErr_SetString(PyExc_TypeError, "know_core takes types");
            return NULL;
        }
        Py_XSETREF(*types[i], (PyTypeObject *)Py_NewRef(given));
    }
    if (find_slots(slots, sizeof(slots) / sizeof(*slots)) < 0)
        return NULL;
    Py_RETURN_NONE;
}
