#!/bin/sh
# The work of scripts/share-tools: does in the shared folder /src what a developer does, and fails where a tool finds something
# that it does not expect of a file system.
set -eu
cd /src
step() {
    echo "$1: $(($(date +%s) - began)) s"
    began=$(date +%s)
}
expect() {
    [ "$1" = "$2" ] || { printf 'expected: %s\nfound: %s\n' "$2" "$1" >&2; exit 1; }
}
began=$(date +%s)

# git: many small files, renames over existing ones, locks, packs that are mapped.
export HOME=/tmp GIT_CONFIG_GLOBAL=/tmp/gitconfig
git config --global user.name name
git config --global user.email name@example.com
git config --global init.defaultBranch main
git config --global safe.directory '*'
git init -q --bare up.git
git clone -q up.git first 2>/dev/null
for file in $(seq 60); do
    mkdir -p "first/d$((file % 5))"
    seq "$file" "$((file * 20))" >"first/d$((file % 5))/f$file"
done
cd first
git add -A
git commit -qm one
git push -q
cd ..
git clone -q up.git second
cd second
expect "$(git status --porcelain)" ''
echo more >>d1/f1
git mv d2/f2 d2/moved
rm d3/f3
expect "$(git status --porcelain | sort | tr '\n' ';')" ' D d3/f3; M d1/f1;R  d2/f2 -> d2/moved;'
git add -A
git commit -qm two
git push -q
git gc -q
git fsck --full --strict
git checkout -q HEAD~1
expect "$(wc -l <d1/f1)" 20
git checkout -q -
git -C ../first pull -q
expect "$(git -C ../first rev-parse HEAD)" "$(git rev-parse HEAD)"
cd ..
step git

# SQLite: two processes write to one database, and have its index in memory that they share (WAL).
sqlite3 db 'PRAGMA journal_mode = WAL; CREATE TABLE t (x)' >/dev/null
write() {
    for number in $(seq 25); do
        sqlite3 -cmd '.timeout 60000' db "INSERT INTO t VALUES ($number)"
    done
}
write &
other=$!
write
wait "$other"
expect "$(sqlite3 db 'SELECT count(*), sum(x) FROM t; PRAGMA integrity_check' | tr '\n' ' ')" '50|650 ok '
step sqlite

# make: what is newer than what.
mkdir build
for unit in $(seq 12); do
    echo "int f$unit(void) { return $unit; }" >"build/f$unit.c"
done
{
    seq 12 | sed 's/.*/int f&(void);/'
    echo '#include <stdio.h>'
    printf "int main(void) { printf(\"%%d\\\\n\", %s); }\n" "$(seq 12 | sed "s/.*/f&()/" | paste -s -d +)"
} >build/main.c
printf 'all: main.o %s\n\ttcc -o all $^\n%%.o: %%.c\n\t@echo $@\n\t@tcc -c -o $@ $<\n' \
    "$(seq 12 | sed 's/.*/f&.o/' | tr '\n' ' ')" >build/Makefile
make -s -j 2 -C build >/dev/null
expect "$(build/all)" 78
make -q -C build
sleep 1
echo 'int f3(void) { return 30; }' >build/f3.c
expect "$(make -s -C build)" f3.o
expect "$(build/all)" 105
step make

# pip: an environment of thousands of files, and a package without a network.
python3 -m venv venv
python3 - <<'PYTHON'
import zipfile
with zipfile.ZipFile("shared-1-py3-none-any.whl", "w") as wheel:
    wheel.writestr("shared.py", "print('imported')")
    wheel.writestr("shared-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: shared\nVersion: 1\n")
    wheel.writestr("shared-1.dist-info/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
    wheel.writestr("shared-1.dist-info/RECORD", "shared.py,,\n")
PYTHON
venv/bin/pip install -q --no-index --disable-pip-version-check ./shared-1-py3-none-any.whl
expect "$(venv/bin/python -c 'import shared')" imported
step pip
echo well
