# The work of scripts/engine-start, which sets HUSK, KERNEL, RUNS and BUSYBOX.
# shellcheck disable=SC2153
set -eu
work=$(mktemp -d)
export HOME="$work" TMPDIR="$work"
trap 'podman_with "$work/husk-oci" rm -f -t 0 -a >/dev/null 2>&1; rm -rf "$work"' EXIT
ln -s "$HUSK" "$work/husk-oci"

podman_with() {
    runtime=$1
    shift
    podman --root "$work/storage" --runroot "$work/run" --tmpdir "$work/tmp" --storage-driver vfs --cgroup-manager cgroupfs \
        --events-backend none --runtime "$runtime" "$@"
}

# A root file system with busybox, as an image and as a bundle for each runtime.
mkdir -p "$work/rootfs/bin" "$work/rootfs/proc" "$work/rootfs/sys" "$work/rootfs/dev" "$work/rootfs/tmp"
cp "$BUSYBOX" "$work/rootfs/bin/busybox"
for applet in sh true sleep; do ln -s busybox "$work/rootfs/bin/$applet"; done
tar cf "$work/root.tar" -C "$work/rootfs" .
podman_with crun import "$work/root.tar" box >/dev/null 2>&1
podman_with crun import --change 'CMD ["/bin/sleep", "1000000"]' "$work/root.tar" pause >/dev/null 2>&1
mkdir "$work/bundle"
(cd "$work/bundle" && "$work/husk-oci" spec)
sed -i -e 's/"terminal": true/"terminal": false/' -e 's|"sh"|"true"|' -e "s|\"path\": \"rootfs\"|\"path\": \"$work/rootfs\"|" \
    -e "s|^{|{ \"annotations\": { \"io.husk.kernel\": \"$KERNEL\" },|" "$work/bundle/config.json"

# Milliseconds since the host's start.
now() { awk '{ printf "%d", $1 * 1000 }' /proc/uptime; }

# measure NAME COMMAND...: a line of results.
measure() {
    name=$1
    shift
    before=$(now)
    if ! "$@" </dev/null >/dev/null 2>"$work/errors"; then
        echo "failed: $*" >&2
        cat "$work/errors" >&2
        exit 1
    fi
    echo "$name $(($(now) - before))" >>"$work/results"
}

run_alone() { "$1" --root "$work/state" run -b "$work/bundle" measured; }
run_podman() { podman_with "$1" run --rm --network none --annotation "io.husk.kernel=$KERNEL" box true; }
run_in_pod() { podman_with "$1" run --rm --pod pod box true; }

round() {
    run=$1
    shift
    for runtime in crun "$work/husk-oci"; do
        measure "$run:${runtime##*/}" "$run" "$runtime"
    done
}

# Without a result: the first of each reads files for all.
run_alone crun; run_alone "$work/husk-oci"
i=0
while [ "$i" -lt "$RUNS" ]; do
    round run_alone
    round run_podman
    i=$((i + 1))
done
mkdir -p "$work/.cache/husk/kernels/micro"
cp "$KERNEL" "$work/.cache/husk/kernels/micro/vmlinux"
for runtime in crun "$work/husk-oci"; do
    podman_with "$runtime" pod create --share-parent=false --name pod --network none --infra-image localhost/pause >/dev/null 2>&1
    measure "pod_start:${runtime##*/}" podman_with "$runtime" pod start pod
    i=0
    while [ "$i" -lt "$RUNS" ]; do
        measure "run_in_pod:${runtime##*/}" run_in_pod "$runtime"
        i=$((i + 1))
    done
    podman_with "$runtime" pod rm -f -t 0 pod >/dev/null 2>&1
done

median() { grep "^$1 " "$work/results" | cut -d' ' -f2 | sort -n | awk '{ all[NR] = $1 } END { print all[int((NR + 1) / 2)] }'; }
printf '%-34s %12s %8s\n' '' 'crun ms' husk
for row in 'run_alone:the runtime alone, to the exit' 'run_podman:podman run --rm IMAGE true' 'pod_start:podman pod start' \
    'run_in_pod:podman run --rm --pod POD IMAGE true'; do
    crun=$(median "${row%%:*}:crun") husk=$(median "${row%%:*}:husk-oci")
    printf '%-34s %12d %7.2fx\n' "${row#*:}" "$crun" "$(awk "BEGIN { print $husk / $crun }")"
done

# Memory of a running container: the proportional sizes of its processes, and what the guest has touched.
podman_with "$work/husk-oci" run -d --network none --annotation "io.husk.kernel=$KERNEL" --name kept box sleep 1000 >/dev/null
sleep 2
for dir in /proc/[0-9]*; do
    case $(tr '\0' ' ' <"$dir/cmdline" 2>/dev/null) in
        *oci*supervise*) cat "$dir/smaps_rollup" 2>/dev/null ;;
    esac
done | awk '/^Pss:/ { pss += $2 } END { printf "\nmemory of a container, conmon aside: %.1f MiB\n", pss / 1024 }'
