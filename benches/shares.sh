#!/bin/sh
# The measurements of scripts/shares, run where guests can run. Does the same work in a directory as a container that has it as a bind
# mount, and in machines that share it with each cache, in turn. Requires HUSK, KERNEL and ROOT, whose /init does the work, and INITRD,
# which is the same as an archive; FILES, MIB, RUNS and CACHES are optional, and so are VIRTIOFSD and QEMU.
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

# QEMU ends when the guest reboots, and virtiofsd when QEMU does.
in_qemu() {
    "$VIRTIOFSD" --socket-path "$work/socket" --shared-dir "$work/share" --cache "$1" --log-level error &
    server=$!
    until [ -S "$work/socket" ]; do
        kill -0 "$server" || return 1
        sleep 0.1
    done
    "$QEMU" -M microvm,x-option-roms=off,isa-serial=on,rtc=off,pit=off,pic=off,memory-backend=memory -bios qboot.rom \
        -accel kvm -cpu host -m 512 -object memory-backend-memfd,id=memory,size=512M,share=on -nodefaults -no-user-config \
        -display none -serial stdio -no-reboot -chardev "socket,id=share,path=$work/socket" \
        -device vhost-user-fs-device,chardev=share,tag=share -kernel "$KERNEL" -initrd "$INITRD" \
        -append "quiet console=ttyS0 reboot=t end=reboot files=$FILES mib=$MIB" </dev/null
    kill "$server" 2>/dev/null || true
    wait
    rm -f "$work/socket"
}

# What is run, in turn: `container`, a cache of husk's, or one of virtiofsd's.
contenders="container $CACHES"
if [ -n "${VIRTIOFSD:-}" ]; then
    for cache in $CACHES; do
        [ "$cache" = writeback ] || contenders="$contenders virtiofsd-$cache"
    done
fi

# Notes `CONTENDER NAME RATE` for each line of a run. One that does not say that all is well has failed, which another server may.
note() {
    tr -d '\r' <"$work/output" >"$work/clean"
    if ! grep -q '^well$' "$work/clean"; then
        echo "$1:" >&2
        cat "$work/clean" >&2
        case $1 in virtiofsd-*) ;; *) exit 1 ;; esac
    fi
    awk -v who="$1" 'NF == 2 && $2 ~ /^[0-9.]+$/ { print who, $1, $2 }' "$work/clean" >>"$work/lines"
}

for _ in $(seq "$RUNS"); do
    for contender in $contenders; do
        case $contender in
            container) in_container ;;
            virtiofsd-*) in_qemu "${contender#virtiofsd-}" ;;
            *) in_machine "$contender" ;;
        esac >"$work/output" 2>&1 || true
        note "$contender"
    done
done

# Medians, and their ratios to the container's.
median() {
    awk -v who="$1" -v name="$2" '$1 == who && $2 == name { print $3 }' "$work/lines" | sort -n |
        awk '{ all[NR] = $1 } END { print all[int((NR + 1) / 2)] }'
}
header="| operation |"
for contender in $contenders; do
    header="$header $contender |"
done
echo "$header"
awk '$1 == "container" && !seen[$2]++ { print $2 }' "$work/lines" | while read -r name; do
    base=$(median container "$name")
    row="| $name | $base |"
    for contender in ${contenders#container }; do
        row="$row $(echo "$(median "$contender" "$name") $base" | awk '{ if (NF == 2) printf "%.3g", $1 / $2 }') |"
    done
    echo "$row"
done
