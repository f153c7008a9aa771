#!/bin/sh
# The work of scripts/shares in /share, in a container or a machine: `work FILES MIB`.
set -eu
export PATH=/bin
/bin/measure /share "$1" "$2"

# Two processes write to one database. Both have its index in memory that they share (WAL).
cd /share
rm -f db db-wal db-shm
sqlite3 db 'pragma journal_mode = wal; create table t (x)' >/dev/null
started=$(awk '{ print $1 }' /proc/uptime)
for process in 1 2; do
    seq 100 | awk -v process=$process '{ print "insert into t values (" process * 1000 + $1 ");" }' |
        sqlite3 -cmd '.timeout 60000' db &
done
wait
echo "$started $(awk '{ print $1 }' /proc/uptime)" | awk '{ print "transactions", 200 / ($2 - $1 + 0.01) }'
found=$(sqlite3 db 'pragma integrity_check; select count(*) from t' | tr '\n' ' ')
rm -f db db-wal db-shm
[ "$found" = 'ok 200 ' ] || { echo "$found"; exit 1; }

# A build: sources with a common header, of which objects and an archive are made.
mkdir build
cd build
printf '#include <%s.h>\n' stdio stdlib string >common.h
for number in $(seq 40); do
    cat >"$number.c" <<END
#include "common.h"
int f$number(const char *text) { return printf("%s %zu", text, strlen(text)) + $number; }
END
done
started=$(awk '{ print $1 }' /proc/uptime)
for number in $(seq 40); do
    tcc -c "$number.c" -o "$number.o"
done
tcc -ar build.a ./*.o
echo "$started $(awk '{ print $1 }' /proc/uptime)" | awk '{ print "build", 40 / ($2 - $1 + 0.01) }'
cd ..
rm -rf build
echo well
