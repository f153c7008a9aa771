#!/bin/sh
# The measurements of scripts/network, run where guests can run. Compares a server in a network namespace, in machines with a tap
# device served by vhost-net or by husk, and in machines with passt, on MMIO and on PCI, in turn. Requires HUSK, KERNEL and ROOT (with
# iperf3); IP, SECONDS_EACH, RUNS and NETWORKS are optional.
set -eu
IP=${IP:-ip} SECONDS_EACH=${SECONDS_EACH:-3} RUNS=${RUNS:-3} NETWORKS=${NETWORKS:-tap vhost passt}
work=$(mktemp -d)
server='mkdir -p /www; echo here >/www/index.html; httpd -p 80 -h /www; iperf3 -s >/tmp/perf & echo ready; exec sleep 100000'
started=''

# shellcheck disable=SC2317 # a trap runs it
clean_up() {
    for pid in $started; do
        kill "$pid" 2>/dev/null || true
    done
    wait
    umount "$ROOT/dev" 2>/dev/null || true
    $IP link del husk-bench0 2>/dev/null || true
    rm -rf "$work"
}
trap clean_up EXIT

# passt requires a default route, and its user must have a name.
if ! $IP route | grep -q '^default'; then
    $IP link add uplink type veth peer name uplink-out
    $IP addr add 198.51.100.2/24 dev uplink
    $IP link set uplink up
    $IP link set uplink-out up
    $IP route add default via 198.51.100.1
fi
grep -q '^nobody:' /etc/passwd || echo 'nobody:x:65534:65534:nobody:/:/bin/false' >>/etc/passwd

# Waits until a server has logged that it is ready.
wait_ready() {
    for _ in $(seq 1200); do
        ! grep -q ready "$1" || return 0
        sleep 0.1
    done
    cat "$1" >&2
    return 1
}

# shellcheck disable=SC2016 # expanded by the inner shell
unshare -n sh -c 'echo $$ >"$1/pid"; exec sleep 100000' - "$work" &
started="$started $!"
until [ -s "$work/pid" ]; do sleep 0.1; done
inside=$(cat "$work/pid")
$IP link add husk-bench0 type veth peer name eth0 netns "$inside"
$IP addr add 198.18.1.1/24 dev husk-bench0
$IP link set husk-bench0 up
in_space() { nsenter -t "$inside" -n "$@"; }
in_space "$IP" addr add 198.18.1.2/24 dev eth0
in_space "$IP" link set eth0 up
in_space "$IP" link set lo up
mkdir -p "$ROOT/dev"
mount --bind /dev "$ROOT/dev"
in_space chroot "$ROOT" /bin/busybox sh -c "$server" >"$work/container" 2>&1 &
started="$started $!"
wait_ready "$work/container"

# Starts a machine named $1 with the transport $2, the server and the remaining options.
machine() {
    name=$1 transport=$2
    shift 2
    "$HUSK" run --kernel "$KERNEL" --transport "$transport" "$@" "$ROOT" sh -c "$server" >"$work/$name" 2>&1 &
    started="$started $!"
    wait_ready "$work/$name"
}

# Starts a machine named $1 with the transport $2, the tap device husk-bench$3, and its options $4.
on_tap() {
    machine "$1" "$2" --network "tap=husk-bench$3,ip=198.18.$3.2/24,$4"
    $IP addr add "198.18.$3.1/24" dev "husk-bench$3"
    $IP link set "husk-bench$3" up
    contenders="$contenders $1:198.18.$3.2:5201:80"
}

# Starts a machine named $1 with the transport $2 on passt, whose ports are published as $3 more than their numbers.
on_passt() {
    machine "$1" "$2" -p "$(($3 + 80)):80" -p "$(($3 + 5201)):5201"
    contenders="$contenders $1:127.0.0.1:$(($3 + 5201)):$(($3 + 80))"
}

contenders=container:198.18.1.2:5201:80
for network in $NETWORKS; do
    case $network in
        tap) on_tap tap mmio 2 vhost=off; on_tap tap-pci pci 4 vhost=off ;;
        vhost) [ ! -e /dev/vhost-net ] || { on_tap vhost mmio 3 vhost=on; on_tap vhost-pci pci 5 vhost=on; } ;;
        passt) on_passt passt mmio 10000; on_passt passt-pci pci 20000 ;;
    esac
done

# Prints the throughput in Mbit/s, to the server or, with -R, from it.
rate() {
    iperf3 -c "$1" -p "$2" -t "$SECONDS_EACH" -f m ${3:+"$3"} | awk '/receiver/ { print $(NF - 2) }'
}

# Prints the median of twenty requests for a small page, in milliseconds.
page() {
    for _ in $(seq 20); do
        curl -s -o /dev/null -w '%{time_total}\n' "http://$1:$2/"
    done | sort -n | awk '{ all[NR] = $1 } END { printf "%.2f\n", all[int(NR / 2) + 1] * 1000 }'
}

echo "network, run, to the server (Mbit/s), from the server (Mbit/s), a small page (ms)"
for run in $(seq "$RUNS"); do
    for contender in $contenders; do
        # shellcheck disable=SC2046 # split into four words
        set -- $(echo "$contender" | tr : ' ')
        echo "$1, $run, $(rate "$2" "$3"), $(rate "$2" "$3" -R), $(page "$2" "$4")"
    done
done | tee "$work/lines"

# Medians, because some runs are ten times slower than others.
median() {
    awk -F ', ' -v name="$1" -v column="$2" '$1 == name { print $column }' "$work/lines" | sort -n |
        awk '{ all[NR] = $1 } END { print all[int((NR + 1) / 2)] }'
}
for contender in $contenders; do
    name=${contender%%:*}
    for column in 3 4 5; do
        echo "$(median "$name" "$column") $(median container "$column")"
    done | awk -v name="$name" '{ median[NR] = $1; ratio[NR] = $1 / $2 } END {
        printf "%s: %s Mbit/s to the server and %s from it, %s ms for a page: %.2f, %.2f and %.2f times the container'\''s\n", name,
            median[1], median[2], median[3], ratio[1], ratio[2], ratio[3] }'
done
