#!/bin/sh
# The measurements of scripts/network, run where guests can run. Compares a server in a network namespace, in machines with a tap
# device (on MMIO or PCI, served by vhost-net or by husk), and in a machine with passt, in turn. Requires HUSK, KERNEL and ROOT (with iperf3);
# IP, SECONDS_EACH and RUNS are optional.
set -eu
IP=${IP:-ip} SECONDS_EACH=${SECONDS_EACH:-3} RUNS=${RUNS:-3}
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

# Starts a machine named $1 with the tap device husk-bench$2, its options $3, and the transport $4.
on_tap() {
    "$HUSK" run --kernel "$KERNEL" --transport "$4" --network "tap=husk-bench$2,ip=198.18.$2.2/24$3" "$ROOT" \
        sh -c "$server" >"$work/$1" 2>&1 &
    started="$started $!"
    wait_ready "$work/$1"
    $IP addr add "198.18.$2.1/24" dev "husk-bench$2"
    $IP link set "husk-bench$2" up
}
on_tap tap 2 ,vhost=off mmio
on_tap tap-pci 4 ,vhost=off pci
contenders='container:198.18.1.2:5201:80 tap:198.18.2.2:5201:80 tap-pci:198.18.4.2:5201:80 passt:127.0.0.1:15201:18080'
if [ -e /dev/vhost-net ]; then
    on_tap vhost 3 ,vhost=on mmio
    on_tap vhost-pci 5 ,vhost=on pci
    contenders="$contenders vhost:198.18.3.2:5201:80 vhost-pci:198.18.5.2:5201:80"
fi
"$HUSK" run --kernel "$KERNEL" -p 18080:80 -p 15201:5201 "$ROOT" sh -c "$server" >"$work/passt" 2>&1 &
started="$started $!"
wait_ready "$work/passt"

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
    [ "$name" != container ] || continue
    for column in 3 4 5; do
        echo "$(median "$name" "$column") $(median container "$column")"
    done | awk -v name="$name" '{ ratio[NR] = $1 / $2 } END {
        printf "%s: %.2f of the container'\''s throughput to the server, %.2f from it; a page takes %.2f times as long\n", name,
            ratio[1], ratio[2], ratio[3] }'
done
