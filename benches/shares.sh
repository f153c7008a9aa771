#!/bin/sh
# The measurements of scripts/shares, run where guests can run. Does the same work in a directory as a container that has it as a bind
# mount, and in machines that share it with each cache, in turn. Requires HUSK, KERNEL and ROOT, whose /init does the work, and INITRD,
# which is the same as an archive; FILES, MIB, RUNS and CACHES are optional.
set -eu
FILES=${FILES:-1000} MIB=${MIB:-64} RUNS=${RUNS:-3} CACHES=${CACHES:-auto always never}
work=$(mktemp -d)
# shellcheck disable=SC2317 # a trap runs it
clean_up() {
    umount "$ROOT/share" 2>/dev/null || true
    rm -rf "$work"
}
trap clean_up EXIT
mkdir -p "$ROOT/share" "$work/share"

# Namespaces of its own, like a container's.
in_container() {
    # shellcheck disable=SC2016 # expanded by the inner shell
    unshare -m sh -c 'mount --bind "$1" "$2/share" && mount --bind /proc "$2/proc" &&
        exec chroot "$2" /bin/busybox sh /work "$3" "$4"' - \
        "$work/share" "$ROOT" "$FILES" "$MIB"
}

in_machine() {
    "$HUSK" boot --kernel "$KERNEL" --initrd "$INITRD" --memory 512M --share "$work/share:share,cache=$1" \
        --cmdline "quiet files=$FILES mib=$MIB" </dev/null
}

# Notes `CONTENDER NAME RATE` for each line of a run. One that does not say that all is well has failed.
note() {
    tr -d '\r' <"$work/output" >"$work/clean"
    if ! grep -q '^well$' "$work/clean"; then
        cat "$work/clean" >&2
        exit 1
    fi
    awk -v who="$1" 'NF == 2 && $2 ~ /^[0-9.]+$/ { print who, $1, $2 }' "$work/clean" >>"$work/lines"
}

for _ in $(seq "$RUNS"); do
    in_container >"$work/output" 2>&1 || true
    note container
    for cache in $CACHES; do
        in_machine "$cache" >"$work/output" 2>&1 || true
        note "$cache"
    done
done

# Medians, and their ratios to the container's.
median() {
    awk -v who="$1" -v name="$2" '$1 == who && $2 == name { print $3 }' "$work/lines" | sort -n |
        awk '{ all[NR] = $1 } END { print all[int((NR + 1) / 2)] }'
}
awk '$1 == "container" && !seen[$2]++ { print $2 }' "$work/lines" | while read -r name; do
    base=$(median container "$name")
    row="| $name | $base |"
    for cache in $CACHES; do
        row="$row $(echo "$(median "$cache" "$name") $base" | awk '{ printf "%.3g", $1 / $2 }') |"
    done
    echo "$row"
done
