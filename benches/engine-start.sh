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
mkdir -p "$work/.cache/husk/kernels/micro"
cp "$KERNEL" "$work/.cache/husk/kernels/micro/vmlinux"
for bundle in warm booted; do
    mkdir "$work/$bundle"
    (cd "$work/$bundle" && "$work/husk-oci" spec)
    sed -i -e 's/"terminal": true/"terminal": false/' -e 's|"sh"|"true"|' -e "s|\"path\": \"rootfs\"|\"path\": \"$work/rootfs\"|" \
        "$work/$bundle/config.json"
done
sed -i 's|^{|{ "annotations": { "io.husk.warm": "false" },|' "$work/booted/config.json"
# Where engines that run as root have them.
warm=/var/lib/husk/warm/containers
"$work/husk-oci" warm --interfaces 0 >/dev/null

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

# The variants: crun, husk from a warm machine, and husk that boots.
runtime_of() { if [ "$1" = crun ]; then echo crun; else echo "$work/husk-oci"; fi; }
bundle_of() { if [ "$1" = booted ]; then echo "$work/booted"; else echo "$work/warm"; fi; }
run_alone() { "$(runtime_of "$1")" --root "$work/state" run -b "$(bundle_of "$1")" measured; }
run_podman() {
    annotation=io.husk.warm=true
    [ "$1" != booted ] || annotation=io.husk.warm=false
    podman_with "$(runtime_of "$1")" run --rm --network none --annotation "$annotation" box true
}
run_in_pod() { podman_with "$(runtime_of "$1")" run --rm --pod pod box true; }

round() {
    run=$1
    for variant in crun warm booted; do
        measure "$run:$variant" "$run" "$variant"
    done
}

# Without a result: the first of each reads files for all.
for variant in crun warm booted; do run_alone "$variant"; done
i=0
while [ "$i" -lt "$RUNS" ]; do
    round run_alone
    round run_podman
    i=$((i + 1))
done
for variant in crun warm booted; do
    # podman gives the container of a pod that makes the machine no annotations.
    [ "$variant" != booted ] || mv "$warm" "$warm.away"
    podman_with "$(runtime_of "$variant")" pod create --share-parent=false --name pod --network none --infra-image localhost/pause \
        >/dev/null 2>&1
    measure "pod_start:$variant" podman_with "$(runtime_of "$variant")" pod start pod
    i=0
    while [ "$i" -lt "$RUNS" ]; do
        measure "run_in_pod:$variant" run_in_pod "$variant"
        i=$((i + 1))
    done
    podman_with "$(runtime_of "$variant")" pod rm -f -t 0 pod >/dev/null 2>&1
    [ "$variant" != booted ] || mv "$warm.away" "$warm"
done

median() { grep "^$1 " "$work/results" | cut -d' ' -f2 | sort -n | awk '{ all[NR] = $1 } END { print all[int((NR + 1) / 2)] }'; }
printf '%-34s %12s %8s %8s\n' '' 'crun ms' warm booted
for row in 'run_alone:the runtime alone, to the exit' 'run_podman:podman run --rm IMAGE true' 'pod_start:podman pod start' \
    'run_in_pod:podman run --rm --pod POD IMAGE true'; do
    crun=$(median "${row%%:*}:crun") warm=$(median "${row%%:*}:warm") booted=$(median "${row%%:*}:booted")
    echo "$crun $warm $booted" | awk -v name="${row#*:}" '{ printf "%-34s %12d %7.2fx %7.2fx\n", name, $1, $2 / $1, $3 / $1 }'
done

# Memory of a running container: the proportional sizes of its processes, and what the guest has touched.
podman_with "$work/husk-oci" run -d --network none --name kept box sleep 1000 >/dev/null
sleep 2
for dir in /proc/[0-9]*; do
    case $(tr '\0' ' ' <"$dir/cmdline" 2>/dev/null) in
        *oci*supervise*) cat "$dir/smaps_rollup" 2>/dev/null ;;
    esac
done | awk '/^Pss:/ { pss += $2 } END { printf "\nmemory of a container, conmon aside: %.1f MiB\n", pss / 1024 }'
