/*
 * The bench's load: N TCP SYNs or UDP datagrams, each with its own (source address, source port), as
 * fast as the node takes them and never faster: before every batch the number of packets that wait in the
 * node's NFQUEUEs is read, and nothing is sent while it exceeds the bound. So the queue and its
 * socket never overflow, and the worker under test always has work.
 *
 * Frames go out by sendmmsg on a packet socket of the client namespace. A veth pair delivers them
 * within the system call, so the node's work up to the queue (all of it, for kernel DNAT) is
 * charged to this process: it prints its own CPU time for that reason.
 *
 * The gauge is /proc/net/netfilter/nfnetlink_queue (net/netfilter/nfnetlink_queue.c, seq_show) of
 * the node namespace, opened from inside it and kept.
 *
 * Usage: flood -c CLIENT_NETNS -n NODE_NETNS -i DEVICE -m NODE_MAC -d VIP -p PORT
 *              -f FIRST_SOURCE -s PORTS -k COUNT -w IN_FLIGHT [-r PER_SECOND] [-b BATCH] [-u] [-e FLOWS]
 * A network namespace is named by its file. Sources are FIRST_SOURCE onwards, PORTS ports (1024..) each;
 * the kernel's --queue-balance goes by addresses alone, so few PORTS spread the load over queues. -u sends
 * UDP. -e sends bare ACKs of FLOWS connections in turn, which conntrack takes for established ones once it has
 * seen the first (nf_conntrack_tcp_loose). BATCH: frames per system call, 64 unless told. Prints one JSON object.
 * Exit: 0 all sent and the queues empty, 1 a system call failed, 2 wrong usage, 4 the queue stood
 * still for ten seconds.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <net/if.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { MAX_BATCH = 64, MAX_PORTS = 32768, FIRST_PORT = 1024, STALL_S = 10, NAP_NS = 50000 };

/* What differs between frames is at the same place in both kinds. */
struct __attribute__((packed)) tcp {
    uint32_t sequence, acknowledgement;
    uint8_t offset, flags;
    uint16_t window, checksum, urgent;
    uint8_t options[20]; /* a Linux client's SYN has as many */
};
struct __attribute__((packed)) udp {
    uint16_t length, checksum;
    uint32_t number; /* the payload */
};
struct __attribute__((packed)) frame {
    uint8_t destination_mac[6], source_mac[6];
    uint16_t ethertype;
    uint8_t version, tos;
    uint16_t length, id, fragment;
    uint8_t ttl, protocol;
    uint16_t ip_checksum;
    uint32_t source, destination;
    uint16_t source_port, destination_port;
    union { struct tcp tcp; struct udp udp; };
};

static uint64_t now_ns(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

static void die(const char *operation)
{
    fprintf(stderr, "flood: %s: %s\n", operation, strerror(errno));
    exit(1);
}

static void enter(const char *netns)
{
    int fd = open(netns, O_RDONLY | O_CLOEXEC);
    if (fd < 0 || setns(fd, CLONE_NEWNET))
        die(netns);
    close(fd);
}

/* RFC 1071, over an even number of bytes; the running sum is in network byte order. */
static uint32_t add(uint32_t sum, const void *bytes, size_t length)
{
    const uint8_t *at = bytes;
    for (size_t i = 0; i < length; i += 2) {
        uint16_t word;
        memcpy(&word, at + i, 2);
        sum += word;
    }
    return sum;
}

static uint16_t fold(uint32_t sum)
{
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    return (uint16_t)~sum;
}

/* Packets handed to userspace and not answered yet, over all queues of the node. */
static unsigned waiting(int gauge)
{
    char text[4096];
    ssize_t got = pread(gauge, text, sizeof text - 1, 0);
    if (got < 0)
        die("read nfnetlink_queue");
    text[got] = 0;
    unsigned sum = 0;
    for (char *line = text; line && *line; line = strchr(line, '\n'), line = line ? line + 1 : NULL) {
        unsigned queue, port, count;
        if (sscanf(line, "%u %u %u", &queue, &port, &count) == 3)
            sum += count;
    }
    return sum;
}

static void nap(uint64_t nanoseconds)
{
    struct timespec time = {(time_t)(nanoseconds / 1000000000u), (long)(nanoseconds % 1000000000u)};
    nanosleep(&time, NULL);
}

static uint64_t laps_waited;
static unsigned most_waiting;

/* Sleeps until at most `bound` packets wait; exits if none is answered for STALL_S seconds. */
static void wait_for_room(int gauge, unsigned bound)
{
    unsigned last = waiting(gauge), count = last;
    uint64_t moved = now_ns();
    if (last > most_waiting)
        most_waiting = last;
    while (count > bound) {
        laps_waited++;
        nap(NAP_NS);
        count = waiting(gauge);
        if (count < last)
            moved = now_ns();
        else if (now_ns() - moved > STALL_S * 1000000000ull) {
            fprintf(stderr, "flood: %u packets wait and none was answered for %d s\n", count, STALL_S);
            exit(4);
        }
        last = count;
    }
}

static long long microseconds(const struct timeval *from, const struct timeval *to)
{
    return (long long)(to->tv_sec - from->tv_sec) * 1000000 + (to->tv_usec - from->tv_usec);
}

int main(int argc, char **argv)
{
    const char *client = NULL, *node = NULL, *device = NULL;
    struct in_addr vip = {0}, first = {0};
    unsigned mac[6], port = 0, ports = 0, in_flight = 0;
    unsigned long long count = 0, rate = 0, flows = 0;
    int option, have = 0, is_udp = 0, batch = MAX_BATCH;
    while ((option = getopt(argc, argv, "c:n:i:m:d:p:f:s:k:w:r:b:ue:")) != -1)
        switch (option) {
        case 'c': client = optarg; break;
        case 'n': node = optarg; break;
        case 'i': device = optarg; break;
        case 'm': have += sscanf(optarg, "%x:%x:%x:%x:%x:%x", mac, mac + 1, mac + 2, mac + 3, mac + 4, mac + 5) == 6; break;
        case 'd': have += inet_pton(AF_INET, optarg, &vip) == 1; break;
        case 'f': have += inet_pton(AF_INET, optarg, &first) == 1; break;
        case 'p': port = (unsigned)atoi(optarg); break;
        case 's': ports = (unsigned)atoi(optarg); break;
        case 'k': count = strtoull(optarg, NULL, 10); break;
        case 'w': in_flight = (unsigned)atoi(optarg); break;
        case 'r': rate = strtoull(optarg, NULL, 10); break;
        case 'b': batch = atoi(optarg); break;
        case 'u': is_udp = 1; break;
        case 'e': flows = strtoull(optarg, NULL, 10); break;
        default: return 2;
        }
    if (!client || !node || !device || have != 3 || !port || port > 65535 || !count || !in_flight ||
        !ports || ports > MAX_PORTS || batch < 1 || batch > MAX_BATCH) {
        fprintf(stderr, "flood: an option is missing or wrong; the head of flood.c lists them\n");
        return 2;
    }
    enter(node);
    int gauge = open("/proc/thread-self/net/netfilter/nfnetlink_queue", O_RDONLY | O_CLOEXEC);
    if (gauge < 0)
        die("open /proc/net/netfilter/nfnetlink_queue");
    enter(client);
    prctl(PR_SET_TIMERSLACK, 1);

    int fd = socket(AF_PACKET, SOCK_RAW | SOCK_CLOEXEC, 0);
    if (fd < 0)
        die("socket(AF_PACKET)");
    struct sockaddr_ll link = {.sll_family = AF_PACKET, .sll_ifindex = (int)if_nametoindex(device)};
    int one = 1;
    if (!link.sll_ifindex || bind(fd, (struct sockaddr *)&link, sizeof link))
        die(device);
    if (setsockopt(fd, SOL_PACKET, PACKET_QDISC_BYPASS, &one, sizeof one))
        die("setsockopt(PACKET_QDISC_BYPASS)");

    const uint8_t protocol = is_udp ? IPPROTO_UDP : IPPROTO_TCP;
    const uint16_t length = 20 + 4 + (is_udp ? sizeof(struct udp) : sizeof(struct tcp));
    struct frame model = {
        .ethertype = htons(ETH_P_IP),
        .version = 0x45, .length = htons(length), .fragment = htons(0x4000), .ttl = 64, .protocol = protocol,
        .destination = vip.s_addr, .destination_port = htons((uint16_t)port),
    };
    if (is_udp)
        model.udp = (struct udp){.length = htons(length - 20)};
    else
        model.tcp = (struct tcp){
            .offset = 0xa0, .flags = flows ? 0x10 : 0x02, .window = htons(64240),
            /* MSS 1460, SACK permitted, timestamps, NOP, window scale 7 */
            .options = {2, 4, 0x05, 0xb4, 4, 2, 8, 10, 0, 0, 0, 1, 0, 0, 0, 0, 1, 3, 3, 7},
        };
    for (int i = 0; i < 6; i++)
        model.destination_mac[i] = (uint8_t)mac[i];
    model.source_mac[0] = 2;
    uint32_t ip_base = add(0, &model.version, 20);
    uint16_t pseudo[2] = {htons(protocol), htons(length - 20)};
    uint32_t base = add(add(add(0, &model.destination, 4), pseudo, 4), &model.source_port, length - 20u);

    static struct frame frames[MAX_BATCH];
    static struct iovec vectors[MAX_BATCH];
    static struct mmsghdr messages[MAX_BATCH];
    for (int i = 0; i < batch; i++) {
        frames[i] = model;
        vectors[i] = (struct iovec){&frames[i], ETH_HLEN + length};
        messages[i].msg_hdr = (struct msghdr){.msg_iov = &vectors[i], .msg_iovlen = 1};
    }
    struct rusage started, usage;
    getrusage(RUSAGE_SELF, &started);
    uint64_t begin = now_ns(), due = begin, retries = 0;
    for (unsigned long long sent = 0; sent < count;) {
        int size = count - sent < (unsigned)batch ? (int)(count - sent) : batch;
        for (int i = 0; i < size; i++) {
            struct frame *frame = &frames[i];
            unsigned long long number = flows ? (sent + (unsigned)i) % flows : sent + (unsigned)i;
            frame->source = htonl(ntohl(first.s_addr) + (uint32_t)(number / ports));
            frame->source_port = htons((uint16_t)(FIRST_PORT + number % ports));
            frame->ip_checksum = fold(add(ip_base, &frame->source, 4));
            uint32_t mixed = (uint32_t)number * 2654435761u;
            uint32_t sum = add(add(base, &frame->source, 4), &frame->source_port, 2);
            sum = add(sum, &mixed, 4);
            if (is_udp) {
                frame->udp.number = mixed;
                uint16_t checksum = fold(sum);
                frame->udp.checksum = checksum ? checksum : 0xffff; /* 0 says: none, RFC 768 */
            } else {
                frame->tcp.sequence = mixed;
                frame->tcp.checksum = fold(sum);
            }
        }
        wait_for_room(gauge, in_flight);
        if (rate) {
            uint64_t now = now_ns();
            if (now < due)
                nap(due - now);
            due += (uint64_t)size * 1000000000u / rate;
        }
        for (int done = 0; done < size;) {
            int got = sendmmsg(fd, messages + done, (unsigned)(size - done), 0);
            if (got > 0)
                done += got;
            else if (errno == ENOBUFS || errno == EAGAIN) { /* the receiving end's backlog is full: not sent */
                retries++;
                nap(NAP_NS);
            } else if (errno != EINTR)
                die("sendmmsg");
        }
        sent += (unsigned)size;
    }
    uint64_t sending = now_ns() - begin;
    wait_for_room(gauge, 0);
    uint64_t wall = now_ns() - begin;
    getrusage(RUSAGE_SELF, &usage);
    printf("{\"sent\": %llu, \"sending_ns\": %llu, \"wall_ns\": %llu, \"user_us\": %lld, \"system_us\": %lld, \"naps\": %llu, "
           "\"retries\": %llu, \"most_waiting\": %u}\n",
           count, (unsigned long long)sending, (unsigned long long)wall,
           microseconds(&started.ru_utime, &usage.ru_utime), microseconds(&started.ru_stime, &usage.ru_stime),
           (unsigned long long)laps_waited, (unsigned long long)retries, most_waiting);
    return 0;
}
