/*
 * Real clients of a Service, one call at a time: connect(), an HTTP request, the first bytes of its
 * answer, and a close that resets the connection (SO_LINGER 0), so that neither side keeps a TIME_WAIT.
 *
 * Usage: calls -n NETNS -d ADDRESS -p PORT -k COUNT -t SECONDS -s FIRST_PORT [-r PER_SECOND]
 * Ends after COUNT calls or SECONDS. With -r calls begin at even distances, else one follows the other.
 * Prints a line for each call: nanoseconds of connect(), nanoseconds from the start of connect() to the
 * answer, and what the answer's header X-Backend says. Calls come from FIRST_PORT, FIRST_PORT + 1, ...: the
 * kernel itself would give a port out again, whose entry conntrack still holds, for every 10 s it begins at another
 * place (EPHEMERAL_PORT_SHUFFLE_PERIOD, net/core/secure_seq.c).
 * Exit: 0 all calls were answered, 1 a call failed, 2 wrong usage.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

enum { NAME = 64, ANSWER = 4096, ANSWER_TIMEOUT_S = 5 };

struct call { uint32_t connect_ns, answer_ns; char backend[NAME]; };

static const char request[] = "GET / HTTP/1.1\r\nHost: measured\r\n\r\n";

static uint64_t now_ns(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

static void die(const char *operation, unsigned long number)
{
    fprintf(stderr, "calls: call %lu: %s: %s\n", number, operation, strerror(errno));
    exit(1);
}

/* Reads until the header is there; its value goes to `backend`. */
static void read_answer(int fd, char *backend, unsigned long number)
{
    static const char name[] = "\r\nX-Backend: ";
    char answer[ANSWER];
    size_t have = 0;
    while (have + 1 < sizeof answer) {
        ssize_t got = recv(fd, answer + have, sizeof answer - have - 1, 0);
        if (got == 0)
            errno = ECONNABORTED;
        if (got <= 0)
            die("no answer", number);
        have += (size_t)got;
        answer[have] = 0;
        const char *at = strstr(answer, name);
        const char *end = at ? strstr(at + sizeof name - 1, "\r\n") : NULL;
        if (end) {
            int length = (int)(end - at) - (int)(sizeof name - 1);
            snprintf(backend, NAME, "%.*s", length, at + sizeof name - 1);
            return;
        }
    }
    errno = EPROTO;
    die("the answer has no X-Backend", number);
}

static void one_call(struct call *call, const struct sockaddr_in *to, unsigned long first_port, unsigned long number)
{
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct linger reset = {1, 0};
    struct timeval patience = {ANSWER_TIMEOUT_S, 0};
    struct sockaddr_in own = {.sin_family = AF_INET, .sin_port = htons((uint16_t)(first_port + number))};
    if (fd < 0 || setsockopt(fd, SOL_SOCKET, SO_LINGER, &reset, sizeof reset) ||
        setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience) ||
        setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience)) /* bounds connect() too */
        die("socket", number);
    if (bind(fd, (struct sockaddr *)&own, sizeof own))
        die("bind", number);
    uint64_t begin = now_ns();
    if (connect(fd, (const struct sockaddr *)to, sizeof *to))
        die("connect", number);
    uint64_t connected = now_ns();
    if (send(fd, request, sizeof request - 1, MSG_NOSIGNAL) != sizeof request - 1)
        die("send", number);
    read_answer(fd, call->backend, number);
    call->connect_ns = (uint32_t)(connected - begin);
    uint64_t answered = now_ns() - begin;
    call->answer_ns = answered > UINT32_MAX ? UINT32_MAX : (uint32_t)answered;
    close(fd);
}

int main(int argc, char **argv)
{
    struct sockaddr_in to = {.sin_family = AF_INET};
    const char *netns = NULL;
    unsigned long count = 0, rate = 0, made = 0, first_port = 0;
    double seconds = 0;
    int option;
    while ((option = getopt(argc, argv, "n:d:p:k:t:r:s:")) != -1)
        switch (option) {
        case 'n': netns = optarg; break;
        case 'd': if (inet_pton(AF_INET, optarg, &to.sin_addr) != 1) return 2; break;
        case 'p': to.sin_port = htons((uint16_t)atoi(optarg)); break;
        case 'k': count = strtoul(optarg, NULL, 10); break;
        case 't': seconds = strtod(optarg, NULL); break;
        case 's': first_port = strtoul(optarg, NULL, 10); break;
        case 'r': rate = strtoul(optarg, NULL, 10); break;
        default: return 2;
        }
    if (!netns || !to.sin_port || !count || seconds <= 0 || !first_port || first_port + count > 65536) {
        fprintf(stderr, "calls: an option is missing or wrong; the head of calls.c lists them\n");
        return 2;
    }
    int fd = open(netns, O_RDONLY | O_CLOEXEC);
    if (fd < 0 || setns(fd, CLONE_NEWNET))
        die(netns, 0);
    struct call *calls = calloc(count, sizeof *calls);
    if (!calls)
        die("calloc", 0);
    prctl(PR_SET_TIMERSLACK, 1);
    uint64_t begin = now_ns(), end = begin + (uint64_t)(seconds * 1e9);
    while (made < count) {
        uint64_t due = rate ? begin + made * 1000000000u / rate : 0, now = now_ns();
        if (now >= end || due >= end)
            break;
        if (now < due) {
            struct timespec pause = {(time_t)((due - now) / 1000000000u), (long)((due - now) % 1000000000u)};
            nanosleep(&pause, NULL);
        }
        one_call(&calls[made], &to, first_port, made);
        made++;
    }
    for (unsigned long i = 0; i < made; i++)
        printf("%u %u %s\n", calls[i].connect_ns, calls[i].answer_ns, calls[i].backend);
    return 0;
}
