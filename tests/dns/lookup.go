// Prints the addresses of a name, as Go's own resolver finds them.
package main

import (
	"context"
	"fmt"
	"net"
	"os"
)

func main() {
	resolver := net.Resolver{PreferGo: true}
	all, err := resolver.LookupIPAddr(context.Background(), os.Args[1])
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	for _, one := range all {
		fmt.Println(one.IP)
	}
}
