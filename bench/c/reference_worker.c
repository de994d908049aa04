/*
 * The reference worker: the least work a userspace balancer can do per new TCP connection with
 * NFQUEUE and ctnetlink, and so the yardstick of the bench. No library, no table look-up, no
 * statistics: one frontend, a weighted random pick, one conntrack entry per SYN.
 *
 * Theory of operation, one lap of the loop:
 *
 *   recvmmsg(queue socket, up to 64)      one NFQNL_MSG_PACKET each
 *   send(ctnetlink socket, 64 x CT_NEW)   one system call; the kernel works while inside it
 *   recv(ctnetlink socket, DONTWAIT)      without NLM_F_ACK only failures answer
 *   send(queue socket, VERDICT_BATCH)     ACCEPT for every id up to the newest: one message
 *
 * The entry (linux/netfilter/nfnetlink_conntrack.h): CTA_TUPLE_ORIG client -> VIP, CTA_TUPLE_REPLY
 * its plain inverse (the kernel rewrites it from CTA_NAT_DST), CTA_TIMEOUT, CTA_NAT_DST. No
 * CTA_PROTOINFO: the SYN, which reaches conntrack only after the verdict, drives the TCP state
 * machine. IPv4 and TCP only; everything else is accepted as it came.
 *
 * Not a proxy: a refused entry (EEXIST on port reuse, a full table) is counted and the packet
 * accepted untranslated. The bench sends every tuple once and rejects a run with errors.
 *
 * Usage: reference_worker QUEUE VIP PORT BACKEND:PORT=WEIGHT...
 * Prints {"ready": true} once the queue is bound; on SIGTERM or SIGINT one JSON object with counts.
 * Exit: 0 stopped by a signal, 1 a kernel call failed, 2 wrong usage.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <linux/netfilter.h>
#include <linux/netfilter/nfnetlink.h>
#include <linux/netfilter/nfnetlink_conntrack.h>
#include <linux/netfilter/nfnetlink_queue.h>
#include <linux/netlink.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

enum {
    BATCH = 64,
    COPY_RANGE = 128,   /* bytes of each packet the kernel copies: IPv4 with options and TCP's ports */
    MESSAGE_SPACE = 512, /* one NFQNL_MSG_PACKET with COPY_RANGE bytes of payload */
    RECEIVE_BUFFER = 8 * 1024 * 1024,
    QUEUE_LENGTH = 4096, /* the kernel's hash of queued packets refuses more, whatever the length says */
    ENTRY_TIMEOUT_S = 10, /* until the SYN refreshes it */
    MAX_BACKENDS = 64,
};

/* One CT_NEW, laid out as it goes to the kernel; only the tuples and the backend change. */
struct attribute8 { uint16_t length, type; uint8_t value, padding[3]; };
struct attribute16 { uint16_t length, type; uint16_t value; uint8_t padding[2]; };
struct attribute32 { uint16_t length, type; uint32_t value; };
struct nest { uint16_t length, type; };
struct tuple {
    struct nest tuple, ip;
    struct attribute32 source, destination;
    struct nest proto;
    struct attribute8 number;
    struct attribute16 source_port, destination_port;
};
struct entry {
    struct nlmsghdr header;
    struct nfgenmsg family;
    struct tuple original, reply;
    struct attribute32 timeout;
    struct nest nat;
    struct attribute32 nat_address;
    struct nest nat_proto;
    struct attribute16 nat_port;
};

struct backend { uint32_t address; uint16_t port; uint32_t cumulative; };

static struct backend backends[MAX_BACKENDS];
static unsigned backend_count;
static uint32_t weight_total;
static uint64_t random_state = 0x9e3779b97f4a7c15u;
static uint64_t batches, packets, entries, errors;
static volatile sig_atomic_t stopping;

static void stop(int signal_number) { (void)signal_number; stopping = 1; }

static void die(const char *operation)
{
    fprintf(stderr, "reference_worker: %s: %s\n", operation, strerror(errno));
    exit(1);
}

/* xorshift64* (Vigna 2016), the high half scaled to the sum of weights (Lemire's multiplication). */
static const struct backend *pick(void)
{
    random_state ^= random_state >> 12;
    random_state ^= random_state << 25;
    random_state ^= random_state >> 27;
    uint64_t high = (random_state * 0x2545f4914f6cdd1du) >> 32;
    uint32_t point = (uint32_t)((high * weight_total) >> 32);
    const struct backend *backend = backends;
    while (point >= backend->cumulative)
        backend++;
    return backend;
}

static void fill_tuple(struct tuple *tuple, uint16_t type)
{
    tuple->tuple = (struct nest){sizeof *tuple, NLA_F_NESTED | type};
    tuple->ip = (struct nest){sizeof tuple->ip + 2 * sizeof(struct attribute32), NLA_F_NESTED | CTA_TUPLE_IP};
    tuple->source = (struct attribute32){8, CTA_IP_V4_SRC, 0};
    tuple->destination = (struct attribute32){8, CTA_IP_V4_DST, 0};
    tuple->proto = (struct nest){sizeof *tuple - offsetof(struct tuple, proto), NLA_F_NESTED | CTA_TUPLE_PROTO};
    tuple->number = (struct attribute8){5, CTA_PROTO_NUM, IPPROTO_TCP, {0}};
    tuple->source_port = (struct attribute16){6, CTA_PROTO_SRC_PORT, 0, {0}};
    tuple->destination_port = (struct attribute16){6, CTA_PROTO_DST_PORT, 0, {0}};
}

static void fill_entry(struct entry *entry)
{
    memset(entry, 0, sizeof *entry);
    entry->header.nlmsg_len = sizeof *entry;
    entry->header.nlmsg_type = NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_NEW;
    entry->header.nlmsg_flags = NLM_F_REQUEST | NLM_F_CREATE | NLM_F_EXCL;
    entry->family = (struct nfgenmsg){AF_INET, NFNETLINK_V0, 0};
    fill_tuple(&entry->original, CTA_TUPLE_ORIG);
    fill_tuple(&entry->reply, CTA_TUPLE_REPLY);
    entry->timeout = (struct attribute32){8, CTA_TIMEOUT, htonl(ENTRY_TIMEOUT_S)};
    entry->nat = (struct nest){sizeof *entry - offsetof(struct entry, nat), NLA_F_NESTED | CTA_NAT_DST};
    entry->nat_address = (struct attribute32){8, CTA_NAT_V4_MINIP, 0};
    entry->nat_proto = (struct nest){sizeof *entry - offsetof(struct entry, nat_proto), NLA_F_NESTED | CTA_NAT_PROTO};
    entry->nat_port = (struct attribute16){6, CTA_PROTONAT_PORT_MIN, 0, {0}};
}

static int open_netfilter(int receive_buffer)
{
    int fd = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_NETFILTER);
    if (fd < 0)
        die("socket(AF_NETLINK, NETLINK_NETFILTER)");
    struct sockaddr_nl kernel = {.nl_family = AF_NETLINK};
    if (bind(fd, (struct sockaddr *)&kernel, sizeof kernel) || connect(fd, (struct sockaddr *)&kernel, sizeof kernel))
        die("bind(AF_NETLINK)");
    if (setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &receive_buffer, sizeof receive_buffer))
        die("setsockopt(SO_RCVBUFFORCE)");
    return fd;
}

/* Sends one NFQNL_MSG_CONFIG with one attribute and waits for its acknowledgement. */
static void configure(int fd, uint16_t queue, const char *what, const void *attributes, size_t length)
{
    struct { struct nlmsghdr header; struct nfgenmsg family; uint8_t attributes[64]; } request = {
        .header = {.nlmsg_len = (uint32_t)(NLMSG_LENGTH(sizeof(struct nfgenmsg)) + length),
                   .nlmsg_type = NFNL_SUBSYS_QUEUE << 8 | NFQNL_MSG_CONFIG,
                   .nlmsg_flags = NLM_F_REQUEST | NLM_F_ACK},
        .family = {AF_UNSPEC, NFNETLINK_V0, htons(queue)},
    };
    memcpy(request.attributes, attributes, length);
    if (send(fd, &request, request.header.nlmsg_len, 0) < 0)
        die(what);
    /* No packet can precede the answer: the copy mode is set last. */
    struct { struct nlmsghdr header; struct nlmsgerr error; uint8_t rest[256]; } answer;
    if (recv(fd, &answer, sizeof answer, 0) < (ssize_t)NLMSG_LENGTH(sizeof(int)))
        die(what);
    if (answer.header.nlmsg_type != NLMSG_ERROR || answer.error.error) {
        errno = answer.header.nlmsg_type == NLMSG_ERROR ? -answer.error.error : EPROTO;
        die(what);
    }
}

static int open_queue(uint16_t queue)
{
    int fd = open_netfilter(RECEIVE_BUFFER);
    struct { struct nest head; struct nfqnl_msg_config_cmd command; } bind_queue = {
        {8, NFQA_CFG_CMD}, {.command = NFQNL_CFG_CMD_BIND, .pf = htons(AF_INET)}};
    configure(fd, queue, "bind the queue", &bind_queue, sizeof bind_queue);
    struct attribute32 length = {8, NFQA_CFG_QUEUE_MAXLEN, htonl(QUEUE_LENGTH)};
    configure(fd, queue, "set the queue's length", &length, sizeof length);
    struct attribute32 flags[2] = {{8, NFQA_CFG_FLAGS, htonl(NFQA_CFG_F_FAIL_OPEN)},
                                   {8, NFQA_CFG_MASK, htonl(NFQA_CFG_F_FAIL_OPEN)}};
    configure(fd, queue, "set fail-open", flags, sizeof flags);
    struct __attribute__((packed)) { struct nest head; uint32_t range; uint8_t mode, padding[3]; } copy = {
        {9, NFQA_CFG_PARAMS}, htonl(COPY_RANGE), NFQNL_COPY_PACKET, {0}};
    configure(fd, queue, "set the copy mode", &copy, sizeof copy);
    return fd;
}

/* What one queue message says: its id, and the IPv4 packet where there is one. */
struct queued { uint32_t id; int has_id; const uint8_t *packet; unsigned length; };

static struct queued parse_message(const uint8_t *message, unsigned length)
{
    struct queued queued = {0};
    const struct nlmsghdr *header = (const struct nlmsghdr *)message;
    if (length < NLMSG_LENGTH(sizeof(struct nfgenmsg)) || header->nlmsg_len > length ||
        header->nlmsg_type != (NFNL_SUBSYS_QUEUE << 8 | NFQNL_MSG_PACKET))
        return queued;
    length = header->nlmsg_len;
    for (unsigned at = NLMSG_LENGTH(sizeof(struct nfgenmsg)); at + sizeof(struct nest) <= length;) {
        const struct nest *attribute = (const struct nest *)(message + at);
        if (attribute->length < sizeof *attribute || attribute->length > length - at)
            break;
        switch (attribute->type & NLA_TYPE_MASK) {
        case NFQA_PACKET_HDR:
            if (attribute->length >= sizeof *attribute + sizeof(struct nfqnl_msg_packet_hdr)) {
                memcpy(&queued.id, attribute + 1, sizeof queued.id);
                queued.id = ntohl(queued.id);
                queued.has_id = 1;
            }
            break;
        case NFQA_PAYLOAD:
            queued.packet = (const uint8_t *)(attribute + 1);
            queued.length = attribute->length - sizeof *attribute;
            break;
        }
        at += NLMSG_ALIGN(attribute->length);
    }
    return queued;
}

/* True for a first fragment of an IPv4 TCP SYN to the frontend; fills the entry for it. */
static int make_entry(struct entry *entry, const struct queued *queued, uint32_t vip, uint16_t port)
{
    const uint8_t *packet = queued->packet;
    if (!packet || queued->length < 40 || packet[0] >> 4 != 4 || packet[9] != IPPROTO_TCP)
        return 0;
    unsigned header = (packet[0] & 15) * 4u;
    if (header < 20 || header + 20 > queued->length || (packet[6] & 0x1f) || packet[7])
        return 0;
    const uint8_t *tcp = packet + header;
    if ((tcp[13] & 0x12) != 0x02) /* SYN without ACK, RFC 9293 section 3.1 */
        return 0;
    uint32_t source, destination;
    uint16_t source_port, destination_port;
    memcpy(&source, packet + 12, 4);
    memcpy(&destination, packet + 16, 4);
    memcpy(&source_port, tcp, 2);
    memcpy(&destination_port, tcp + 2, 2);
    if (destination != vip || destination_port != port)
        return 0;
    entry->original.source.value = entry->reply.destination.value = source;
    entry->original.destination.value = entry->reply.source.value = destination;
    entry->original.source_port.value = entry->reply.destination_port.value = source_port;
    entry->original.destination_port.value = entry->reply.source_port.value = destination_port;
    const struct backend *backend = pick();
    entry->nat_address.value = backend->address;
    entry->nat_port.value = backend->port;
    return 1;
}

/* Counts the failures that the last send left on the socket. */
static uint64_t read_failures(int fd)
{
    static uint8_t buffer[65536];
    uint64_t failures = 0;
    ssize_t got;
    while ((got = recv(fd, buffer, sizeof buffer, MSG_DONTWAIT)) != -1 || errno == ENOBUFS) {
        if (got == -1) { /* answers were lost: at least one failure */
            failures++;
            continue;
        }
        for (size_t at = 0; at + NLMSG_LENGTH(sizeof(int)) <= (size_t)got;) {
            const struct nlmsghdr *header = (const struct nlmsghdr *)(buffer + at);
            if (header->nlmsg_len < sizeof *header)
                break;
            if (header->nlmsg_type == NLMSG_ERROR && ((const struct nlmsgerr *)NLMSG_DATA(header))->error)
                failures++;
            at += NLMSG_ALIGN(header->nlmsg_len);
        }
    }
    return failures;
}

static void work(int queue_fd, int conntrack_fd, uint16_t queue, uint32_t vip, uint16_t port)
{
    static uint8_t space[BATCH][MESSAGE_SPACE] __attribute__((aligned(8)));
    static struct entry batch[BATCH];
    static struct mmsghdr messages[BATCH];
    static struct iovec vectors[BATCH];
    for (int i = 0; i < BATCH; i++) {
        fill_entry(&batch[i]);
        vectors[i] = (struct iovec){space[i], MESSAGE_SPACE};
        messages[i].msg_hdr = (struct msghdr){.msg_iov = &vectors[i], .msg_iovlen = 1};
    }
    struct {
        struct nlmsghdr header;
        struct nfgenmsg family;
        struct nest head;
        struct nfqnl_msg_verdict_hdr verdict;
    } verdict = {
        .header = {.nlmsg_len = sizeof verdict,
                   .nlmsg_type = NFNL_SUBSYS_QUEUE << 8 | NFQNL_MSG_VERDICT_BATCH,
                   .nlmsg_flags = NLM_F_REQUEST},
        .family = {AF_UNSPEC, NFNETLINK_V0, htons(queue)},
        .head = {12, NFQA_VERDICT_HDR},
        .verdict = {.verdict = htonl(NF_ACCEPT)},
    };
    while (!stopping) {
        int got = recvmmsg(queue_fd, messages, BATCH, MSG_WAITFORONE, NULL);
        if (got < 0) {
            if (errno == ENOBUFS)
                errors++;
            else if (errno != EINTR && errno != EAGAIN)
                die("recvmmsg(queue)");
            continue;
        }
        unsigned made = 0;
        uint32_t newest = 0;
        int seen = 0;
        for (int i = 0; i < got; i++) {
            struct queued queued = parse_message(space[i], messages[i].msg_len);
            if (!queued.has_id)
                continue;
            seen++;
            newest = queued.id;
            if (make_entry(&batch[made], &queued, vip, port)) {
                batch[made].header.nlmsg_seq = queued.id;
                made++;
            }
        }
        if (made) {
            uint64_t failed = 0;
            if (send(conntrack_fd, batch, made * sizeof *batch, 0) < 0)
                failed = made;
            else
                failed = read_failures(conntrack_fd);
            errors += failed;
            entries += made - (failed < made ? failed : made);
        }
        if (seen) {
            batches++;
            packets += (unsigned)seen;
            verdict.verdict.id = htonl(newest);
            if (send(queue_fd, &verdict, sizeof verdict, 0) < 0)
                die("send(verdict)");
        }
    }
}

static int parse_backend(char *text)
{
    char *colon = strchr(text, ':'), *equals = strchr(text, '=');
    struct in_addr address;
    if (!colon || !equals || equals < colon || backend_count == MAX_BACKENDS)
        return 0;
    *colon = *equals = 0;
    int port = atoi(colon + 1), weight = atoi(equals + 1);
    if (inet_pton(AF_INET, text, &address) != 1 || port < 1 || port > 65535 || weight < 1)
        return 0;
    weight_total += (uint32_t)weight;
    backends[backend_count++] = (struct backend){address.s_addr, htons((uint16_t)port), weight_total};
    return 1;
}

int main(int argc, char **argv)
{
    struct in_addr vip;
    if (argc < 5 || inet_pton(AF_INET, argv[2], &vip) != 1) {
        fprintf(stderr, "usage: reference_worker QUEUE VIP PORT BACKEND:PORT=WEIGHT...\n");
        return 2;
    }
    uint16_t queue = (uint16_t)atoi(argv[1]), port = htons((uint16_t)atoi(argv[3]));
    for (int i = 4; i < argc; i++)
        if (!parse_backend(argv[i])) {
            fprintf(stderr, "reference_worker: backend %s: expected ADDRESS:PORT=WEIGHT\n", argv[i]);
            return 2;
        }
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    random_state ^= (uint64_t)now.tv_nsec << 32 | (uint64_t)getpid();

    struct sigaction action = {.sa_handler = stop};
    sigaction(SIGTERM, &action, NULL);
    sigaction(SIGINT, &action, NULL);
    int conntrack_fd = open_netfilter(1024 * 1024);
    int queue_fd = open_queue(queue);
    /* A signal that lands just before recvmmsg is noticed after this time-out at the latest. */
    struct timeval wake = {0, 200 * 1000};
    if (setsockopt(queue_fd, SOL_SOCKET, SO_RCVTIMEO, &wake, sizeof wake))
        die("setsockopt(SO_RCVTIMEO)");
    printf("{\"ready\": true}\n");
    fflush(stdout);
    work(queue_fd, conntrack_fd, queue, vip.s_addr, port);
    printf("{\"batches\": %llu, \"packets\": %llu, \"entries\": %llu, \"errors\": %llu}\n",
           (unsigned long long)batches, (unsigned long long)packets, (unsigned long long)entries,
           (unsigned long long)errors);
    return 0;
}
